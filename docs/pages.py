"""Collects the pages of the site in one folder: those of `docs/`, and those outside of it.

    python docs/pages.py build/docs

Pages stay where readers of the repository look for them. This script copies them, adapts their
links, and copies every other file that a page links to. `make docs` builds the site from that
folder.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

ROOT = Path(__file__).parents[1]
# Path in the checkout -> path on the site. Pages in docs/ keep their paths.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "results/README.md": "results.md",
}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def write_site(folder: Path) -> None:
    """Writes all pages into `folder`, and the files that they link to.

    Raises:
        OSError: a page links to a file that does not exist.
    """
    inside = (path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    places = {**OUTSIDE, **{path: path.removeprefix("docs/") for path in inside}}
    for source, place in places.items():

        def turned(link: re.Match[str], source: str = source, place: str = place) -> str:
            path = normpath(join(dirname(source), link[1]))
            if path not in places:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, folder / path)
            return relpath(places.get(path, path), dirname(place) or ".")

        text = LINK.sub(turned, (ROOT / source).read_text(encoding="utf-8"))
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    write_site(Path(sys.argv[1]))
