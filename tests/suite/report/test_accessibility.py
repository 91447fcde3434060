"""The page works with keyboards, screen readers, light and dark, on paper and small screens."""

from itertools import pairwise

import numpy as np
import pytest
from report_page import expected, places
from selenium.webdriver.common.keys import Keys

NAMED = {
    *("button", "checkbox", "columnheader", "combobox", "image", "link", "navigation", "region"),
    *("rowheader", "searchbox", "spinbutton", "table", "textbox"),
}


def test_whatever_can_be_used_has_a_name(page, run):
    page.open(run[2]).unfold()
    page.press(page.all("#table tbody button")[0])
    page.browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    page.browser.execute_cdp_cmd("Accessibility.disable", {})
    found = [
        (n["role"]["value"], n["name"]["value"]) for n in nodes if not n["ignored"] and "name" in n
    ]
    assert [role for role, name in found if role in NAMED and not name.strip()] == []
    roles = {role for role, _ in found}
    assert NAMED - {"checkbox", "textbox"} <= roles
    for pair in (("combobox", "Task"), ("searchbox", "Search in questions and choices")):
        assert pair in found
    assert ("table", "Questions before (none) and after (random@0.01)") in found
    assert ("button", "Question 0") in found and ("image", "What it shows") in found
    assert "status" in roles and "main" in roles


def test_structure(page, run):
    page.open(run[2]).unfold()
    page.press(page.all("#table tbody button")[0])
    levels = [int(h.tag_name[1]) for h in page.all("h1, h2, h3, h4, h5, h6")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = page.js("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    pointed = page.js(
        "return ['for', 'aria-labelledby', 'aria-controls'].flatMap(name =>"
        " [...document.querySelectorAll(`[${name}]`)].map(e => e.getAttribute(name)))"
    )
    assert set(pointed) <= set(ids)
    anchors = [a.get_attribute("href").split("#")[1] for a in page.all("a")]
    assert set(anchors) <= set(ids) and len(anchors) == 4
    for control in page.all("input, select"):
        assert control.get_property("labels"), control.get_attribute("id")
    for table in page.all("table"):
        assert table.find_elements("css selector", "caption")[0].text
    cells = page.js("return [...document.querySelectorAll('th')].filter(e => !e.scope).length")
    assert cells == 0
    assert page.js("return document.documentElement.lang") == "en"


def luminance(colour):
    """Relative luminance of "rgb(r, g, b)", WCAG 2.2."""
    channels = [int(x) / 255 for x in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


def contrast(a, b):
    darker, lighter = sorted((luminance(a), luminance(b)))
    return (lighter + 0.05) / (darker + 0.05)


COLOURS = """
const ground = e => { while (e) { const c = getComputedStyle(e).backgroundColor;
  if (c !== 'rgba(0, 0, 0, 0)') return c; e = e.parentElement; } return 'rgb(255, 255, 255)'; };
const found = [];
for (const e of document.querySelectorAll('body, body *')) {
  if (!e.checkVisibility() || e.matches('script, option')) continue;
  const style = getComputedStyle(e), of = e.tagName + '.' + e.className;
  if ([...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.matches('input, select'))
    found.push([of, style.color, ground(e), 4.5]);
  for (const side of ['::before', '::after'])
    if (getComputedStyle(e, side).content.startsWith('"'))
      found.push([of + side, getComputedStyle(e, side).color, ground(e), 4.5]);
  if (e.matches('input, select, .mark')) found.push([of, style.borderTopColor, ground(e), 3]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, run, scheme):
    page.open(run[2], "#condition=bim%400.01").unfold()
    page.media(prefers_color_scheme=scheme)
    for button in page.all("#table tbody button")[1:4]:
        page.press(button)
    found = page.js(COLOURS)
    assert len({of for of, *_ in found}) > 30
    grounds = {ground for *_, ground, _ in found}
    assert (
        max(map(luminance, grounds)) < 0.1
        if scheme == "dark"
        else min(map(luminance, grounds)) > 0.7
    )
    low = {(of, *pair) for of, *pair, least in found if contrast(*pair) < least}
    assert low == set()


def test_a_narrow_screen(page, run):
    page.open(run[2]).unfold()
    page.press(page.all("#table tbody button")[0])
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.js("return innerWidth") == 400
    assert page.js("return document.documentElement.scrollWidth") <= 400
    small = page.js(
        "return [...document.querySelectorAll('button, input, select, summary')]"
        ".filter(e => e.checkVisibility()).filter(e => {"
        " const r = e.getBoundingClientRect(); return Math.min(r.width, r.height) < 24;"
        "}).map(e => e.outerHTML)"
    )
    assert small == []


def test_print(page, run):
    page.open(run[2])
    page.media("print", prefers_color_scheme="dark")
    for name in ("controls", "pages"):
        assert not page[name].is_displayed()
    assert page["table"].is_displayed() and page["status"].is_displayed()
    ground = page.js("return getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"


def test_the_keyboard_is_enough(page, run):
    samples, questions, path = run
    page.open(path)
    page.key(Keys.TAB)
    assert page.focused().text == "Skip to the questions"
    assert page.focused().rect["x"] >= 0
    page.key(Keys.ENTER)
    assert page.focused() == page["questions"]
    stops, headings = [], len(page.all("#table thead th"))
    for _ in range(10 + headings):
        page.key(Keys.TAB)
        stops.append(page.focused().get_attribute("id") or page.focused().text)
        style = "const s = getComputedStyle(document.activeElement);"
        style += "return [s.outlineStyle, s.outlineWidth]"
        assert page.js(style) == ["solid", "3px"], stops[-1]
    controls = ["task", "condition", "change", "search", "size", "reset", "region"]
    assert stops[:8] == ["180 questions, before and after", *controls]
    assert stops[8 : 8 + headings][-1] == "Margin change"
    page.key(Keys.SHIFT, Keys.TAB, Keys.TAB)
    assert page.focused().text == "Margin change"
    rows = expected(samples, questions)
    for key, order in ((Keys.ENTER, "ascending"), (Keys.SPACE, "descending")):
        page.key(key)
        assert page.rows() == places(rows, "margin_change", order)[:50]
        assert page.focused().text == "Margin change"
    page.key(Keys.TAB)
    for key, opened in ((Keys.ENTER, 1), (Keys.SPACE, 0), (Keys.SPACE, 1)):
        page.key(key)
        assert len(page.all(".details")) == opened
    page["search"].send_keys("stone")
    found = places(expected(samples, questions, search="stone"), "margin_change", "descending")
    page.wait(lambda _: page["status"].text.startswith(f"{len(found)} of 180"))
    page.key(Keys.ENTER)
    assert page.rows() == found[:50]
