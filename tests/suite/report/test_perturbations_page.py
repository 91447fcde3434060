"""perturbations.html shows the content of the files: in a real Chromium, from a disk, offline."""

import re
import time

import numpy as np
import pytest
from browsing import requests
from perturbed_input import CONDITIONS, HOSTILE, build
from report_page import Report
from selenium.webdriver.common.keys import Keys
from test_accessibility import COLOURS, NAMED, contrast

from llm_attack.suite.analysis import perturbations
from llm_attack.suite.report import perturbations as writing
from llm_attack.suite.report.perturbations import write_page

LOADED = "return document.getElementById('status').textContent.startsWith('Question ')"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, samples, questions)"""
    folder = tmp_path_factory.mktemp("run")
    samples, questions = build(folder)
    assert write_page(folder, samples, questions, "m")
    return folder, samples, questions


@pytest.fixture
def page(browser):
    """The page; afterwards the console must be empty, and nothing outside asked for."""
    requests(browser)
    yield Report(browser)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    assert browser.get_log("browser") == []
    inside = re.compile(r"data:|file:///.*/perturbations(\.html|/pages/\d+\.js)(#|$)")
    assert [url for url in requests(browser) if not inside.match(url)] == []


def shown(page, run, address):
    page.browser.get("about:blank")
    page.browser.get((run[0] / "perturbations.html").as_uri() + address)
    page.wait(lambda _: page.js(LOADED))
    return page


def pick(page, name, text):
    """Chooses an option as a reader does."""
    find = "return [...arguments[0].options].find(o => o.text === arguments[1])"
    page.js(find, page[name], text).click()


def number(text):
    return np.nan if text == "–" else float(text.split()[0].replace("−", "-"))


def rows(page, choice):
    """The cells of the table of a choice, which is opened."""
    (unit,) = [u for u in page.all(".unit") if f"of choice {choice}:" in u.text.split("\n")[0]]
    page.js("arguments[0].open = true", unit)
    page.wait(lambda _: unit.find_elements("css selector", "tbody tr"))
    return page.js(
        "return [...arguments[0].querySelectorAll('tbody tr')].map(r =>"
        " [...r.cells].map(c => c.textContent))",
        unit,
    )


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_token_has_its_numbers(page, run, condition):
    folder, samples, questions = run
    found = perturbations.read(folder, "demo", condition)
    for doc_id in (0, 39):
        shown(page, run, f"#task=demo&condition={condition}&question={doc_id}")
        assert page["heading"].text == f"demo, question {doc_id}, under {condition}"
        assert page["text"].text == f"Question {doc_id}? {HOSTILE}"
        for choice, letter in enumerate("AB"):
            request = 2 * doc_id + choice
            place = slice(*found.start[request : request + 2])
            here = found.row[place][found.row[place] >= 0]
            tokens = found.tokens[place][found.row[place] >= 0]
            before, after = found.loss[request]
            cells = rows(page, letter)
            assert len(cells) == len(here) == 20
            for row, token, cell in zip(here, tokens, cells, strict=True):
                near = found.distance[row] < found.norm[row]
                assert cell[1].strip("␣") == found.texts[int(token)].strip()
                assert cell[3].strip("␣") == found.texts[int(found.nearest[row])].strip()
                assert number(cell[2]) == pytest.approx(found.norm[row], rel=6e-3)
                assert number(cell[4]) == pytest.approx(found.distance[row], rel=6e-3)
                assert ("●" in cell[4]) == near
                assert number(cell[5]) == pytest.approx(found.share[row], abs=2e-3)
                assert number(cell[6]) == pytest.approx(
                    100 * found.share[row] / (after - before), abs=0.1, rel=2e-2
                )
            (words,) = [u for u in page.all(".unit > summary") if f"choice {letter}:" in u.text]
            assert "not accounted for: +0.0" in words.text
        answers = page.cells(page["answers"], "textContent")[1:]
        of_question = samples[samples["doc_id"] == doc_id].set_index("condition")
        for choice, cell in enumerate(answers):
            values = [of_question.loc[c, "log_likelihoods"][choice] for c in ("none", condition)]
            assert [number(x) for x in cell[3:]] == pytest.approx(
                [*values, values[1] - values[0]], abs=6e-4
            )
            assert ("gold" in cell[2]) == (choice in questions["gold"][doc_id])
            for name in ("none", condition):
                predicted = of_question.loc[name, "prediction"] == choice
                assert (f"predicted, {name}" in cell[2]) == predicted


def test_order_filter_and_keyboard(page, run):
    samples = run[1]
    shown(page, run, "#task=demo&condition=fgsm%400.01&question=3&order=share")
    shares = [number(cell[5]) for cell in rows(page, "A")]
    assert shares == sorted(shares, reverse=True)
    pick(page, "order", "in their order")
    page.wait(lambda _: [cell[0] for cell in rows(page, "A")] == [str(i) for i in range(1, 21)])
    right = samples.pivot(index="doc_id", columns="condition", values="acc")
    lost = right.index[(right["none"] == 1) & (right["fgsm@0.01"] == 0)].tolist()
    pick(page, "change", "right → wrong")
    page.wait(lambda _: page["status"].text == f"Question 1 of {len(lost)} questions")
    options = page.js("return [...document.getElementById('number').options].map(o => o.text)")
    assert [int(text.split(":")[0]) for text in options] == lost
    page["next"].send_keys(Keys.ENTER)
    page.wait(lambda _: page["status"].text == f"Question 2 of {len(lost)} questions")
    assert f"question={lost[1]}" in page.browser.current_url
    page["previous"].send_keys(Keys.SPACE)
    page.wait(lambda _: page["status"].text == f"Question 1 of {len(lost)} questions")


def test_whatever_can_be_used_has_a_name(page, run):
    shown(page, run, "#question=1")
    page.browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    page.browser.execute_cdp_cmd("Accessibility.disable", {})
    found = [
        (n["role"]["value"], n["name"]["value"]) for n in nodes if not n["ignored"] and "name" in n
    ]
    assert [role for role, name in found if role in NAMED and not name.strip()] == []
    for pair in (("combobox", "Question"), ("table", "Choices before and after")):
        assert pair in found
    ids = page.js("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_a_narrow_screen(page, run, scheme):
    shown(page, run, "#question=1&condition=fgsm%400.01")
    page.media(prefers_color_scheme=scheme)
    rows(page, "B")
    low = {(of, *pair) for of, *pair, least in page.js(COLOURS) if contrast(*pair) < least}
    assert low == set()
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.js("return document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_three_thousand_questions(page, tmp_path):
    """The page stays small, and a question loads the one file that it is in."""
    samples, questions = build(tmp_path, 3000)
    assert write_page(tmp_path, samples, questions, "m")
    assert (tmp_path / "perturbations.html").stat().st_size < 400_000
    pieces = list((tmp_path / "perturbations/pages").iterdir())
    assert len(pieces) > 3
    assert max(path.stat().st_size for path in pieces) < 2_000_000
    requests(page.browser)
    start = time.monotonic()
    shown(page, (tmp_path,), "#condition=fgsm%400.01&question=2999")
    print(f"{time.monotonic() - start:.1f} s")
    asked = [url for url in requests(page.browser) if url.endswith(".js")]
    assert len(asked) == 1
    assert page["status"].text == "Question 3000 of 3000 questions"


def test_a_file_that_is_gone(browser, run):
    """It is said; other questions can still be shown."""
    (path,) = (run[0] / "perturbations/pages").iterdir()
    aside = path.rename(path.with_suffix(".gone"))
    try:
        report = Report(browser)
        browser.get("about:blank")
        browser.get((run[0] / "perturbations.html").as_uri())
        report.wait(lambda _: "cannot be shown: " in report["status"].text)
    finally:
        aside.rename(path)
        browser.get_log("browser")


def test_without_perturbations_there_is_no_page(tmp_path, run):
    assert not write_page(tmp_path, *run[1:], "m")
    assert list(tmp_path.iterdir()) == []


def test_another_run_leaves_no_old_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_NUMBERS", 100)
    for n in (20, 4):
        write_page(tmp_path, *build(tmp_path, n), "m")
        names = {path.name for path in (tmp_path / "perturbations/pages").iterdir()}
        assert names == {f"{i}.js" for i in range(n // 2)}
