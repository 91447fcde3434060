"""A hook of mkdocs: the pages and files of the site that lie outside of this folder.

They are read where they are, so that they stand on the code host as they do here; only their links
are turned to the site's pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "results/README.md": "results.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, and the files that they and those of this folder show or link to."""
    linked = set()
    for path in (*map(ROOT.joinpath, PAGES), *Path(__file__).parent.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        linked |= set(re.findall(r"!\[[^]]*\]\((?:\.\./)?(results/[^)]+)\)", text))
        linked |= set(re.findall(r"\]\((?:\.\./)?(examples/[^)]+)\)", text))
    for path in sorted(linked):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with links as seen from the site's root, where all pages are."""
    markdown = markdown.replace("](../", "](").replace("](docs/", "](")
    for source, name in PAGES.items():
        markdown = markdown.replace(f"]({source}", f"]({name}")
    return markdown
