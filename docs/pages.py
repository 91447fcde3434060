"""A hook of mkdocs: the pages and files of the site that lie outside of this folder.

They are read where they are, so that they stand on the code host as they do here; only their links
are turned to the site's pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Path in the checkout -> path on the site. Pages in docs/ keep theirs.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "results/README.md": "results.md",
}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def target(source: str, link: str) -> str:
    """The path in the checkout that a link of the page `source` leads to."""
    return normpath(join(dirname(source), link))


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside of docs/, and every file outside of it that a page links to."""
    docs = (path.relative_to(ROOT).as_posix() for path in Path(__file__).parent.rglob("*.md"))
    linked = set()
    for source in (*PAGES, *docs):
        links = LINK.findall((ROOT / source).read_text(encoding="utf-8"))
        linked |= {target(source, link) for link in links}
    for path in sorted(linked - PAGES.keys()):
        if not path.startswith("docs/") and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its links as seen from where it is on the site."""
    name = page.file.src_uri
    source = {there: here for here, there in PAGES.items()}.get(name, f"docs/{name}")

    def turned(match: re.Match[str]) -> str:
        path = target(source, match[1])
        return relpath(PAGES.get(path, path.removeprefix("docs/")), dirname(name) or ".")

    return LINK.sub(turned, markdown)
