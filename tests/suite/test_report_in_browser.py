"""report.html in a real Chromium, from the file system: what it shows, sorts and filters is right.

What it should show is computed here by pandas. Skipped where chromium or chromedriver is missing.
After every test, nothing may be in the browser's console, and no address outside was asked for.
"""

import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from report_input import CONDITIONS, HOSTILE, build, table_of

from llm_attack.suite.report import write_report

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not installed"
)
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,1000"),
)
CHANGES = {
    "lost": "right → wrong",
    "gained": "wrong → right",
    "moved": "wrong → other wrong",
    "swapped": "right → other right",
    "same": "no",
}
FIRST = {"task": "", "condition": "random@0.01", "change": "", "search": "", "size": "50"}


def expected(samples, questions, condition="random@0.01", task="", change="", search=""):
    """The rows that pass the filters, with a column for each column of the page."""
    frame = questions.reset_index(drop=True).rename(columns={"doc_id": "id", "gold": "golds"})
    frame["gold"] = frame["golds"].str[0]
    for when, name in (("before", "none"), ("after", condition)):
        answers = samples[samples["condition"] == name].reset_index(drop=True)
        frame[when] = answers["prediction"]
        frame[f"right_{when}"] = answers["acc"] == 1
        pairs = zip(answers["log_likelihoods"], frame["golds"], strict=True)
        frame[f"margin_{when}"] = [margin(np.array(values), gold) for values, gold in pairs]
    frame["margin_change"] = frame["margin_after"] - frame["margin_before"]
    was, now, moved = frame["right_before"], frame["right_after"], frame["before"] != frame["after"]
    kinds = [was & ~now, ~was & now, ~was & ~now & moved, was & now & moved, ~moved]
    frame["change"] = pd.Categorical(np.select(kinds, list(CHANGES), ""), list(CHANGES), True)
    texts = [
        "\n".join([q, *c]).lower() for q, c in zip(frame["question"], frame["choices"], strict=True)
    ]
    passes = pd.Series([search.lower() in text for text in texts])
    if task:
        passes &= frame["task"] == task
    if change:
        passes &= (frame["change"] != "same") if change == "any" else (frame["change"] == change)
    return frame[passes]


def margin(values, gold):
    others = np.delete(values, gold)
    if not len(others) or not np.isfinite(values).all():
        return np.nan
    return values[gold].max() - others.max()


def places(frame, sort=None, order="ascending"):
    if sort:
        up = order == "ascending"
        frame = frame.sort_values(sort, ascending=up, kind="stable", na_position="last")
    return list(zip(frame["task"], frame["id"], strict=True))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER)) as driver:
        driver.get("about:blank")
        requests(driver)  # those of Chromium's own first page
        yield driver


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Samples, questions and the path of their report."""
    samples, questions = build()
    return samples, questions, report(tmp_path_factory.mktemp("run"), samples, questions)


def report(folder, samples, questions):
    figure = folder / "figure.svg"
    figure.write_text("<svg xmlns='http://www.w3.org/2000/svg' width='90' height='60'/>")
    settings = {"command": "llm-attack run " + "-o x " * 200, "settings": {"model": "demo"}}
    settings["attacks"] = {condition: {"epsilon": 0.1} for condition in CONDITIONS}
    figures = [("Title", "What it shows", figure)]
    return write_report(folder, samples, questions, table_of(samples), figures, settings)


# (task, id) of the questions on a page
ROWS = """[...document.querySelectorAll('#table > tbody > tr:not(.details)')].map(row =>
  [row.cells[0].textContent, Number(row.cells[1].firstChild.lastChild.data)])"""


class Report:
    """The page as its reader meets it."""

    def __init__(self, browser):
        self.browser = browser

    def open(self, path, fragment=""):
        self.browser.get("about:blank")  # else a new fragment would not load the page again
        self.browser.get(path.as_uri() + fragment)
        self.wait(lambda _: self["shown"].is_displayed())
        return self

    def __getitem__(self, name):
        return self.browser.find_element("id", name)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition):
        return WebDriverWait(self.browser, 30, 0.02).until(condition)

    def rows(self):
        return list(map(tuple, self.js(f"return {ROWS}")))

    def cells(self, table, text="innerText"):
        """The text of the cells of a table, row by row."""
        script = "row => [...row.cells].map(cell => cell[arguments[1]])"
        return self.js(f"return [...arguments[0].rows].map({script})", table, text)

    def choose(self, name, value):
        """Sets a filter as a reader does, and waits until the address shows it."""
        if name == "search":
            self[name].send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, value)
        else:
            find = "return [...arguments[0].options].find(o => o.value === arguments[1])"
            self.js(find, self[name], value).click()
        kept = None if value == FIRST.get(name) else value
        get = "return new URLSearchParams(location.hash.slice(1)).get(arguments[0])"
        self.wait(lambda _: self.js(get, name) == kept)

    def sort(self, key):
        self.press(self.all(f"#table [data-key={key}] button")[0])

    def press(self, element):
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def sorted_by(self):
        found = self.all("[aria-sort]")
        return [(x.get_attribute("data-key"), x.get_attribute("aria-sort")) for x in found]

    def focused(self):
        return self.browser.switch_to.active_element

    def key(self, *keys):
        self.focused().send_keys(*keys)

    def media(self, media="", **features):
        features = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        of_media = {"media": media, "features": features}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", of_media)


@pytest.fixture
def page(browser):
    yield Report(browser)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []
    asked = requests(browser)
    assert any(address.startswith("file:///") for address in asked)
    inside = re.compile(r"data:|file:///.*/report\.html(#|$)")
    assert [address for address in asked if not inside.match(address)] == []


def requests(browser):
    """Addresses that were asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent]


# a click on every heading (or on those from arguments[0] to arguments[1]), and a second one
SORT = f"""
const buttons = [...document.querySelectorAll('#table > thead button')].slice(...arguments);
return buttons.flatMap(button => [button, button]).map(button => {{
  button.click();
  return [document.querySelectorAll('[aria-sort]').length, button.parentElement.dataset.key,
    button.parentElement.ariaSort, {ROWS}];
}});
"""


def test_sorting_and_filtering_give_the_rows_that_pandas_gives(page, run):
    samples, questions, path = run
    page.open(path)
    assert page.rows() == places(expected(samples, questions))[:50]
    page.choose("size", "500")
    filters = {"condition": "random@0.01"}
    for changed in (
        {},
        {"condition": "fgsm@0.01"},
        {"task": "arc"},
        {"change": "lost"},
        {"change": "any"},
        {"task": "", "change": "", "search": "STONE Lamp"},
        {"search": "σίσυφος", "condition": "bim@0.01"},
        *({"search": "", "change": change} for change in CHANGES),
    ):
        for name, value in changed.items():
            page.choose(name, value)
        filters |= changed
        rows = expected(samples, questions, **filters)
        assert page["status"].text == f"{len(rows)} of 180 questions"
        found = page.js(SORT, *([7, 8] if changed else []))
        assert [x[2] for x in found] == ["ascending", "descending"] * (1 if changed else 10)
        for sorted_columns, key, order, shown in found:
            assert sorted_columns == 1
            assert list(map(tuple, shown)) == places(rows, key, order), (filters, key, order)


def test_every_cell(page, run):
    samples, questions, path = run
    page.open(path, "#size=500&condition=fgsm%400.01")
    cells = page.cells(page["table"], "textContent")[1:]
    rows = expected(samples, questions, "fgsm@0.01").to_dict("records")
    for shown, row in zip(cells, rows, strict=True):
        letters = [chr(65 + gold) for gold in row["golds"]]
        assert shown[:2] == [row["task"], f"Question {row['id']}"]
        assert shown[2] == (row["question"] or "(in the choices)")
        assert shown[3] == ", ".join(letters)
        for cell, when in zip(shown[4:6], ("before", "after"), strict=True):
            mark = "✓ right" if row[f"right_{when}"] else "✗ wrong"
            assert cell == f"{chr(65 + row[when])} {mark}"
        assert shown[6] == CHANGES[row["change"]]
        for cell, key in zip(
            shown[7:], ("margin_before", "margin_after", "margin_change"), strict=True
        ):
            assert number(cell) == pytest.approx(
                row[key], abs=5.1e-4, nan_ok=True
            )  # three decimals
            assert cell.startswith("+") == (key == "margin_change" and row[key] > 0)


def number(cell):
    return np.nan if cell == "–" else float(cell.replace("−", "-"))


def test_a_row_opens_its_choices_and_keeps_them_open(page, run):
    samples, questions, path = run
    page.open(path, "#condition=bim%400.01&task=arc")
    for i, question in enumerate(questions[questions["task"] == "arc"].head(6).to_dict("records")):
        button = page.all("#table > tbody > tr:not(.details) button")[i]
        assert button.get_attribute("aria-expanded") == "false"
        page.press(button)
        assert button.get_attribute("aria-expanded") == "true"
        opened = page[button.get_attribute("aria-controls")]
        assert opened.get_attribute("class") == "details"
        caption, cosine = page.js(
            "return [...arguments[0].querySelectorAll('caption, p')].map(e => e.innerText)", opened
        )
        assert caption == f"Choices of arc {question['doc_id']}"
        answers = samples[(samples["task"] == "arc") & (samples["doc_id"] == question["doc_id"])]
        none, bim = answers.set_index("condition").loc[["none", "bim@0.01"]].to_dict("records")
        assert cosine.startswith("Cosine of embeddings and gradient: ")
        assert number(cosine.split()[-1]) == pytest.approx(none["cosine"], abs=5.6e-4)
        head, *body = page.cells(opened.find_element("tag name", "table"))
        assert head[:3] == ["Choice", "Text", "Marks"]
        assert head[3:] == ["Log-likelihood, none", "Log-likelihood, bim@0.01", "Change"]
        assert len(body) == len(question["choices"])
        for choice, cells in enumerate(body):
            assert cells[:2] == [chr(65 + choice), question["choices"][choice]]
            marks = ["gold"] * (choice in question["gold"])
            marks += ["predicted, none"] * (choice == none["prediction"])
            marks += ["predicted, bim@0.01"] * (choice == bim["prediction"])
            assert cells[2].strip() == " ".join(marks)
            values = [each["log_likelihoods"][choice] for each in (none, bim)]
            values.append(values[1] - values[0])
            assert [number(cell) for cell in cells[3:]] == pytest.approx(values, abs=5.1e-4)
    page.sort("id")
    page.choose("condition", "fgsm@0.01")
    assert len(page.all(".details")) == 6
    assert "predicted, fgsm@0.01" in page.all(".details")[0].text
    for button in page.all("[aria-expanded=true]"):
        page.press(button)
    assert page.all(".details") == [] and page.all("[aria-controls]") == []


def test_hostile_text_is_shown_as_text(page, run):
    _, questions, path = run
    page.open(path)
    for i in range(len(HOSTILE)):
        page.press(page.all("#table > tbody > tr:not(.details) button")[i])
    shown = page.js(
        "return [...document.querySelectorAll('.question div')].map(cell => cell.textContent)"
    )
    assert shown == [text or "(in the choices)" for text in questions["question"][:50]]
    shown = page.js(
        "return [...document.querySelectorAll('.choice')].map(cell => cell.textContent)"
    )
    assert shown == [text for texts in questions["choices"][: len(HOSTILE)] for text in texts]
    assert page.js("return window.hacked") is None
    assert page.js("return document.scripts.length") == 2
    assert page.all("#table img, #table script, #table iframe") == []


def test_pages_follow_one_another(page, run):
    samples, questions, path = run
    page.open(path)
    page.choose("size", "25")
    rows = places(expected(samples, questions))
    disabled = "return [...document.querySelectorAll('#pages button')].map(e => e.ariaDisabled)"
    for start in range(0, 180, 25):
        assert page.rows() == rows[start : start + 25]
        assert page["status"].text == f"180 of 180 questions, page {start // 25 + 1} of 8"
        edges = [str(start == 0).lower()] * 2 + [str(start == 175).lower()] * 2
        assert page.js(disabled) == edges
        page["next"].click()
    assert page.rows() == rows[175:]  # there is no page after the last
    for name, start in (("previous", 150), ("first", 0), ("previous", 0), ("last", 175)):
        page[name].click()
        assert page.rows() == rows[start : start + 25]
    for typed, start in (("3", 50), ("0", 0), ("99", 175), ("", 0)):
        page["page"].send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, typed, Keys.ENTER)
        assert page.rows() == rows[start : start + 25], typed
    page["next"].click()
    page.choose("task", "arc")
    assert page.rows() == places(expected(samples, questions, task="arc"))[:25]


def test_a_view_can_be_linked(page, run):
    samples, questions, path = run
    page.open(path)
    search = "o&=# s"
    view = {"condition": "bim@0.01", "change": "any", "size": "25", "search": "under"}
    for name, value in view.items():
        page.choose(name, value)
    page.sort("margin_after")
    page.sort("margin_after")
    page["next"].click()
    link, rows = page.browser.current_url, page.rows()
    wanted = expected(samples, questions, "bim@0.01", change="any", search="under")
    assert rows == places(wanted, "margin_after", "descending")[25:50] and rows
    page.open(path, "#" + link.split("#")[1])
    assert page.rows() == rows
    assert page.sorted_by() == [("margin_after", "descending")]
    assert {name: page[name].get_property("value") for name in view} == view
    page["reset"].click()
    assert page.rows() == places(expected(samples, questions))[:50]
    assert page.browser.current_url == path.as_uri() + "#"
    page.choose("search", search)
    page.open(path, "#" + page.browser.current_url.split("#")[1])
    assert page["search"].get_property("value") == search


def test_an_address_that_is_no_view_changes_nothing(page, run):
    samples, questions, path = run
    rows = places(expected(samples, questions))
    for odd in (
        "#questions",
        "#task=chess&sort=colour&order=up&size=7&condition=x&page=-2&a=b",
        "#%",
    ):
        page.open(path, odd)
        assert page.rows() == rows[:50] and page.sorted_by() == []
    page.open(path, "#page=99")
    assert page.rows() == rows[150:]
    page.js("location.hash = 'task=arc'")
    page.wait(lambda _: page["task"].get_property("value") == "arc")
    assert page.rows() == places(expected(samples, questions, task="arc"))[:50]
    page.js("location.hash = 'summary'")
    assert page["task"].get_property("value") == "arc"


def test_the_keyboard_is_enough(page, run):
    samples, questions, path = run
    page.open(path)
    page.key(Keys.TAB)
    assert page.focused().text == "Skip to the questions"
    assert page.focused().rect["x"] >= 0
    page.key(Keys.ENTER)
    stops, headings = [], len(page.all("#table thead th"))
    for _ in range(9 + headings):
        page.key(Keys.TAB)
        stops.append(page.focused().get_attribute("id") or page.focused().text)
        style = "const s = getComputedStyle(document.activeElement);"
        style += "return [s.outlineStyle, s.outlineWidth]"
        assert page.js(style) == ["solid", "3px"], stops[-1]
    assert stops[:7] == ["task", "condition", "change", "search", "size", "reset", "region"]
    assert stops[7 : 7 + headings][-1] == "Margin change"
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


def test_without_a_clean_run_there_is_nothing_to_compare_with(page, tmp_path):
    samples, questions = build(10, conditions=CONDITIONS[2:])
    page.open(report(tmp_path, samples, questions), "#change=lost")
    keys = [th.get_attribute("data-key") for th in page.all("#table thead th")]
    assert keys == ["task", "id", "question", "gold", "after", "margin_after"]
    assert page.all("#change") == []
    both = pd.concat(
        [samples, samples[samples["condition"] == "bim@0.01"].assign(condition="none")]
    )
    page.choose("condition", "bim@0.01")
    page.sort("margin_after")
    assert page.rows() == places(expected(both, questions, "bim@0.01"), "margin_after")
    page.press(page.all("#table tbody button")[0])
    assert len(page.all(".details thead th")) == 4


def test_a_clean_run_alone(page, tmp_path):
    samples, questions = build(10, conditions=["none"])
    page.open(report(tmp_path, samples, questions))
    assert page.rows() == places(expected(samples, questions, "none"))
    assert {cell.text for cell in page.all(".change")} == {"no"}
    page.press(page.all("#table tbody button")[0])
    assert len(page.all(".details thead th")) == 4


def test_a_missing_answer_is_no_change_of_any_kind(page, tmp_path):
    samples, questions = build(5, tasks=("arc",))
    missing = (samples["doc_id"] == 6) & (samples["condition"] == "random@0.01")
    page.open(report(tmp_path, samples[~missing], questions))
    cells = page.cells(page["table"])[3]
    assert cells[0] == "arc" and [i for i, text in enumerate(cells) if text == "–"] == [5, 6, 8, 9]
    for change in ("any", "same", "lost", "gained", "moved", "swapped"):
        page.choose("change", change)
        assert ("arc", 6) not in page.rows()
    page.press(page.all("#reset")[0])
    page.press(page.all("#table tbody button")[2])
    cells = [cell.text for cell in page.all(".details .number")]
    assert cells.count("–") == 2 * questions["choices"].str.len()[2]


def test_data_that_cannot_be_read_are_told(page, run, tmp_path):
    path = tmp_path / "report.html"
    whole = run[2].read_text("utf-8")
    start = whole.index('id="data">') + 2000
    path.write_text(whole[:start] + "AAAA" * 50 + whole[start + 200 :], "utf-8")
    page.browser.get(path.as_uri())
    page.wait(lambda _: "cannot be shown" in page["status"].text)
    assert not page["shown"].is_displayed()
    assert len(page.browser.get_log("browser")) == 1  # the error itself


@pytest.mark.parametrize("n", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_thousands_of_questions(page, tmp_path, n):
    samples, questions = build(n // 5, tasks=tuple("abcde"))
    page.open(report(tmp_path, samples, questions))
    assert page["status"].text == f"{n:,} of {n:,} questions, page 1 of {n // 50}"
    page.sort("margin_change")
    assert page.rows() == places(expected(samples, questions), "margin_change")[:50]
    page.choose("condition", "bim@0.01")
    page.choose("change", "lost")
    page.choose("search", "river")
    rows = expected(samples, questions, "bim@0.01", change="lost", search="river")
    assert page.rows() == places(rows, "margin_change")[:50]
    assert page["status"].text.startswith(f"{len(rows):,} of {n:,} questions, page 1 of ")


# ---- accessibility


NAMED = {
    *("button", "checkbox", "columnheader", "combobox", "image", "link", "navigation", "region"),
    *("rowheader", "searchbox", "spinbutton", "table", "textbox"),
}


def test_whatever_can_be_used_has_a_name(page, run):
    page.open(run[2])
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
    page.open(run[2])
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
    assert set(anchors) <= set(ids) and len(anchors) == 5
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
    page.open(run[2], "#condition=bim%400.01")
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
    page.open(run[2])
    page.press(page.all("#table tbody button")[0])
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.js("return innerWidth") == 400
    assert page.js("return document.documentElement.scrollWidth") <= 400
    small = [
        e.get_attribute("outerHTML")
        for e in page.all("button, input, select")
        if min(e.rect["width"], e.rect["height"]) < 24
    ]
    assert small == []


def test_print(page, run):
    page.open(run[2])
    page.media("print", prefers_color_scheme="dark")
    for name in ("controls", "pages"):
        assert not page[name].is_displayed()
    assert page["table"].is_displayed() and page["status"].is_displayed()
    ground = page.js("return getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
