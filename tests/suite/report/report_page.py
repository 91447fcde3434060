"""report.html in a browser, and the rows that it should show according to pandas."""

import numpy as np
import pandas as pd
from report_input import CONDITIONS, table_of
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from llm_attack.suite.report.page import write_report

CHANGES = {
    "lost": "right → wrong",
    "gained": "wrong → right",
    "moved": "wrong → other wrong",
    "swapped": "right → other right",
    "same": "no",
}


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


def write(folder, samples, questions):
    figure = folder / "figure.svg"
    figure.write_text("<svg xmlns='http://www.w3.org/2000/svg' width='90' height='60'/>")
    settings = {"command": "llm-attack run " + "-o x " * 200, "settings": {"model": "demo"}}
    settings["attacks"] = {condition: {"epsilon": 0.1} for condition in CONDITIONS}
    figures = [("Title", "What it shows", figure)]
    return write_report(folder, samples, questions, table_of(samples), figures, settings)


FIRST = {"task": "", "condition": "random@0.01", "change": "", "search": "", "size": "50"}


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
        self.unfold("#questions details")
        self.wait(lambda _: self["shown"].is_displayed())
        return self

    def unfold(self, which="details"):
        open_all = "of.forEach(fold => { fold.open = true; })"
        self.js(f"const of = document.querySelectorAll(arguments[0]); {open_all}", which)

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

    def top(self, name):
        """How far the element is below the upper edge of the window, in pixels."""
        return self.js("return arguments[0].getBoundingClientRect().top", self[name])

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
