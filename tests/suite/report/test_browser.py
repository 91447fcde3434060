"""The page shows, sorts and filters in a real Chromium what pandas says it should."""

import numpy as np
import pandas as pd
import pytest
from report_input import CONDITIONS, HOSTILE, build, table_of
from report_page import CHANGES, ROWS, expected, places, write
from selenium.webdriver.common.keys import Keys

from llm_attack.suite.report.page import write_report
from llm_attack.suite.report.tables import Cells

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
    controlled = [b.get_attribute("aria-controls") for b in page.all("[aria-expanded=true]")]
    assert controlled == [row.get_attribute("id") for row in page.all(".details")]
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
    outside = page.all(".question div, .choice")
    assert {(e.get_attribute("dir"), e.get_attribute("lang")) for e in outside} == {("auto", "")}
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
        assert page["page"].get_property("valueAsNumber") == start // 25 + 1
        page["next"].click()
    assert page.rows() == rows[175:]  # there is no page after the last
    assert page["page"].get_property("max") == page["last-page"].text == "8"
    for name, start in (("previous", 150), ("first", 0), ("previous", 0), ("last", 175)):
        page[name].click()
        assert page.rows() == rows[start : start + 25]
    for typed, start in (("3", 50), ("0", 0), ("99", 175), ("", 0)):
        page["page"].send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, typed, Keys.ENTER)
        assert page.rows() == rows[start : start + 25], typed
    page.js("arguments[0].scrollIntoView()", page["pages"])
    page["next"].click()
    assert page["region"].is_displayed() and abs(page.top("region")) < 2
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
    assert abs(page.top("questions")) < 2
    assert page.sorted_by() == [("margin_after", "descending")]
    assert {name: page[name].get_property("value") for name in view} == view
    page.press(page.all("#table tbody button")[0])
    page["reset"].click()
    assert page.all(".details") == []
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


def test_without_a_clean_run_there_is_nothing_to_compare_with(page, tmp_path):
    samples, questions = build(10, conditions=CONDITIONS[2:])
    page.open(write(tmp_path, samples.assign(cosine=None), questions), "#change=lost")
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
    assert page.all(".details p") == []  # nor a gradient


def test_a_clean_run_alone(page, tmp_path):
    samples, questions = build(10, conditions=["none"])
    page.open(write(tmp_path, samples, questions))
    assert page.rows() == places(expected(samples, questions, "none"))
    assert {cell.text for cell in page.all(".change")} == {"no"}
    page.press(page.all("#table tbody button")[0])
    assert len(page.all(".details thead th")) == 4


def test_a_missing_answer_is_no_change_of_any_kind(page, tmp_path):
    samples, questions = build(5, tasks=("arc",))
    missing = (samples["doc_id"] == 6) & (samples["condition"] == "random@0.01")
    page.open(write(tmp_path, samples[~missing], questions))
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
    page.all("#questions summary")[0].click()
    page.wait(lambda _: "cannot be shown" in page["status"].text)
    assert not page["shown"].is_displayed()
    assert len(page.browser.get_log("browser")) == 1  # the error itself


def test_choices_beyond_the_alphabet(page, tmp_path):
    samples, questions = build(1, tasks=("arc",))
    samples["log_likelihoods"] = [np.arange(60.0).tolist()] * 4
    samples["prediction"] = [0, 25, 26, 53]
    questions["choices"], questions["gold"] = [["x"] * 60], [[52]]
    page.open(write(tmp_path, samples, questions))
    for condition, letter in zip(CONDITIONS[1:], ("Z", "AA", "BB"), strict=True):
        page.choose("condition", condition)
        assert page.cells(page["table"], "textContent")[1][3:6] == [
            "BA",
            "A ✗ wrong",
            f"{letter} ✗ wrong",
        ]


@pytest.mark.parametrize("n", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_thousands_of_questions(page, tmp_path, n):
    samples, questions = build(n // 5, tasks=tuple("abcde"))
    page.open(write(tmp_path, samples, questions))
    assert page["status"].text == f"{n:,} of {n:,} questions, page 1 of {n // 50}"
    page.sort("margin_change")
    assert page.rows() == places(expected(samples, questions), "margin_change")[:50]
    page.choose("condition", "bim@0.01")
    page.choose("change", "lost")
    page.choose("search", "river")
    rows = expected(samples, questions, "bim@0.01", change="lost", search="river")
    assert page.rows() == places(rows, "margin_change")[:50]
    assert page["status"].text.startswith(f"{len(rows):,} of {n:,} questions, page 1 of ")


# ---- what is read in ten seconds


def with_costs(samples):
    """So that under bim@0.01 every answer is wrong."""
    wrong = samples["condition"] == "bim@0.01"
    acc = samples["acc"].mask(wrong, 0.0)
    return samples.assign(acc=acc)


def written(folder, conditions=CONDITIONS):
    """A page with two figures, and with tables of a few columns and of many."""
    samples, questions = build(20, conditions=conditions)
    table = table_of(with_costs(samples))
    table["drop"] = 100 * (table["acc"].max() - table["acc"])
    size = "width='900' height='600' viewBox='0 0 9 6'"
    figures = []
    for name in ("one", "two"):
        path = folder / f"{name}.svg"
        path.write_text(f"<svg xmlns='http://www.w3.org/2000/svg' {size}/>")
        figures.append((f"Figure {name}", f"What {name} shows", path))
    settings = {f"setting_{k}": k for k in range(20)}
    attacks = {
        c: {"epsilon": i, **{key: i * k for key, k in settings.items()}}
        for i, c in enumerate(conditions)
    }
    heading = [f"column {i}" for i in range(12)]
    more = {
        "what changed": Cells(heading, [["x 1.5 (0.1 to 2.3)"] * 12], []),
        "claims": Cells(["indistinguishable"] * 4, [["a_long_name_of_a_claim"] * 4], []),
    }
    run = {"command": "llm-attack run -o x", "model_name": "demo", "attacks": attacks}
    path = write_report(folder, samples, questions, table, figures, run, more)
    return samples, questions, path


def sized(page, width, height=900):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def load(page, path, fragment=""):
    """Without opening what is folded."""
    page.browser.get("about:blank")
    page.browser.get(path.as_uri() + fragment)


@pytest.mark.parametrize("width", [1280, 390])
def test_headline_and_figure_come_first_then_the_table_then_folds(page, tmp_path, width):
    sized(page, width)
    load(page, written(tmp_path)[2])
    place = "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
    place += "return [r.top + scrollY, r.bottom + scrollY]"
    headline, figure, attacks, table = (
        page.js(place, which) for which in (".headlines", "figure img", "#attacks", "#accuracy")
    )
    assert headline[1] < 300 and figure[0] < 320
    assert max(figure[1], attacks[1]) <= table[0] + 1
    assert len(page.all("#attacks li")) == 4
    assert [d.get_attribute("open") for d in page.all("details")] == [None] * 5
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert page.all("#shown")[0].is_displayed() is False


@pytest.mark.parametrize("width", [1280, 390])
def test_no_table_is_wider_than_the_page(page, tmp_path, width):
    """Of few and of many columns, the questions and their choices among them."""
    many = ["none", *(f"{a}@{e}" for a in ("random", "fgsm", "bim") for e in (0.1, 0.2, 0.3, 0.4))]
    sized(page, width)
    page.open(written(tmp_path, many)[2]).unfold()
    page.press(page.all("#table tbody button")[2])
    more = "[e.scrollWidth - e.clientWidth, e.querySelector('table').id]"
    found = page.js(f"return [...document.querySelectorAll('.scroll')].map(e => {more})")
    assert len(found) >= 6
    assert [(more, name) for more, name in found if more > 0] == []
    assert page.js("return document.documentElement.scrollWidth") <= width
    label = "return getComputedStyle(document.querySelector('#every td'), '::before').content"
    blocks = width == 390  # each value with the name of its column
    assert page.js(label) == ('"piqa"' if blocks else "none")


def test_the_first_column_stays_where_a_table_is_scrolled(page, tmp_path):
    sized(page, 1280)
    page.open(written(tmp_path)[2])
    page.js("document.querySelector('#accuracy').style.width = '3000px'")
    left = "return document.querySelector('#accuracy tbody th').getBoundingClientRect().left"
    before = page.js(left)
    page.js("document.querySelector('#accuracy').parentElement.scrollLeft = 500")
    assert page.js(left) == before


def test_the_questions_open_on_the_strongest_attack(page, tmp_path):
    samples, questions, path = written(tmp_path)
    page.open(path)
    assert page["condition"].get_property("value") == "bim@0.01"
    assert page.rows() == places(expected(samples, questions, "bim@0.01"))[:50]
    page.choose("condition", "fgsm@0.01")
    page["reset"].click()
    assert page["condition"].get_property("value") == "bim@0.01"


def test_a_question_can_be_linked(page, tmp_path):
    """From whatever view: on its page, opened; filters that hide it are left out."""
    path = written(tmp_path)[2]
    page.open(path)
    page.choose("size", "25")
    page["next"].click()
    task, number_of = page.rows()[3]
    page.press(page.all("#table tbody button")[3])
    asked = "return new URLSearchParams(location.hash.slice(1)).get('question')"
    assert page.js(asked) == f"{task}/{number_of}"
    link = page.browser.current_url.split("#")[1]
    load(page, path, "#" + link)
    page.wait(lambda _: page.all(".details"))
    assert page.all(".details caption")[0].text == f"Choices of {task} {number_of}"
    assert (task, number_of) in page.rows() and page["page"].get_property("value") == "2"
    row = "document.querySelector('[aria-expanded=true]').closest('tr')"
    assert abs(page.js(f"return {row}.getBoundingClientRect().top")) < 2
    page["next"].click()
    assert page.js(asked) is None
    load(page, path, "#task=arc&search=nowhere&question=Wino%2F30")
    page.wait(lambda _: page.all(".details"))
    assert page.all(".details caption")[0].text == "Choices of Wino 30"
    assert page["task"].get_property("value") == "" and page["status"].text.startswith("60 of 60")
    page.press(page.all("[aria-expanded=true]")[0])
    assert page.js(asked) is None
    load(page, path, "#question=Wino%2F31")  # there is none
    page.wait(lambda _: page["shown"].is_displayed())
    assert page.all(".details") == []


def test_links_open_what_is_folded(page, tmp_path):
    load(page, written(tmp_path)[2])
    for name in ("numbers", "figures", "making", "questions"):
        fold = page.all(f"#{name} > details")[0]
        for _ in range(2):  # also if the address points there already
            page.press(page.all(f"nav a[href='#{name}']")[0])
            page.wait(lambda _, fold=fold: fold.get_attribute("open") is not None)
            page.js("arguments[0].open = false", fold)


def test_copy_buttons(page, tmp_path):
    load(page, written(tmp_path)[2])
    page.browser.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, e => done('' + e))"
    button = page.all("[data-copy=accuracy]")[0]
    page.press(button)
    page.wait(lambda _: button.text.startswith("Copied"))
    rows = page.browser.execute_async_script(read).splitlines()
    assert rows[0].split("\t") == ["task", *CONDITIONS, "guessing"]
    assert [row.split("\t")[0] for row in rows[1:]] == ["piqa", "arc", "Wino", "mean"]
    assert rows[4].split("\t")[4].startswith("0.0 ")
    page.unfold()
    page.press(page.all("[data-copy=command]")[0])
    page.wait(lambda _: page.browser.execute_async_script(read) == "llm-attack run -o x")
    page.wait(lambda _: page["shown"].is_displayed())
    page.press(page.all("#table tbody button")[0])
    page.press(page.all(".details .copy")[0])
    wanted = "#condition=bim%400.01&question=piqa%2F0"
    page.wait(lambda _: page.browser.execute_async_script(read).endswith("report.html" + wanted))


def test_figures_enlarge(page, tmp_path):
    sized(page, 390)
    load(page, written(tmp_path)[2])
    image, dialog = page.all("figure img")[0], page["enlarged"]
    small = image.rect["width"]
    for start in (page.all("button.enlarge")[0], image):
        page.press(start)
        assert dialog.get_attribute("open") is not None
        (large,) = dialog.find_elements("css selector", "img")
        assert large.rect["width"] > 2 * small
        assert large.get_attribute("alt") == "What one shows"
        if start is image:
            page["close"].click()
        else:
            page.key(Keys.ESCAPE)
        assert dialog.get_attribute("open") is None
        assert page.focused().text.startswith("Enlarge")


def test_paper_has_what_is_folded_but_not_the_questions(page, tmp_path):
    load(page, written(tmp_path)[2])
    page.js("dispatchEvent(new Event('beforeprint'))")
    opened = [d.get_attribute("open") is not None for d in page.all("details")]
    assert opened == [True, True, True, False, True]
    page.js("dispatchEvent(new Event('afterprint'))")
    assert [d.get_attribute("open") for d in page.all("details")] == [None] * 5
