"""The folder that the site is built from: every link of a page leads to a file in it."""

import runpy

import pytest
from shown import PAGES, ROOT

SITE = runpy.run_path(str(ROOT / "docs/pages.py"))


def test_links_of_the_site(tmp_path):
    SITE["write_site"](tmp_path)
    pages = sorted(tmp_path.rglob("*.md"))
    assert len(pages) == len(PAGES) + 1  # and the changelog
    links = 0
    for page in pages:
        for path in SITE["LINK"].findall(page.read_text("utf-8")):
            assert (page.parent / path).is_file(), (page, path)
            links += 1
    assert links > 100


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in PAGES:
        source = page.relative_to(ROOT).as_posix()
        name = SITE["OUTSIDE"].get(source, source.removeprefix("docs/"))
        assert f": {name}\n" in text, name


def test_a_link_to_a_missing_file(tmp_path, monkeypatch):
    site = SITE["write_site"]
    monkeypatch.setitem(site.__globals__, "ROOT", tmp_path)
    monkeypatch.setitem(site.__globals__, "OUTSIDE", {"README.md": "index.md"})
    (tmp_path / "README.md").write_text("[a figure](results/none.png)")
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        site(tmp_path / "site")
