"""The pages of a board in a browser: sorting, filters, links, and nothing from outside."""

import json

import pytest
from cards import made
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from llm_attack.suite.studies import board


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    cards = [
        made("weak", parameters=2_000_000, robust="0000", clean="0111"),
        made("strong", parameters=135_000_000, robust="0111", clean="1111", family="gpt2"),
        made("flagged", failed=True, robust="0011", clean="1111"),
    ]
    board.save(cards, folder)
    return folder


def shown(browser):
    """The names of the models in the table, in order."""
    rows = browser.find_elements(By.CSS_SELECTOR, "tbody tr")
    return [row.find_element(By.TAG_NAME, "a").text for row in rows if row.is_displayed()]


def test_a_reader_sorts_filters_and_opens_a_model(browser, site):
    browser.get_log("performance")
    browser.get((site / "index.html").as_uri())
    assert shown(browser) == ["strong", "flagged", "weak"]
    assert browser.find_element(By.CSS_SELECTOR, ".flag").accessible_name == "failed a check"

    heads = {head.text.strip(" ▲▼"): head for head in browser.find_elements(By.CSS_SELECTOR, "th")}
    button = heads["Parameters"].find_element(By.TAG_NAME, "button")
    button.send_keys(Keys.ENTER)  # without a mouse
    assert shown(browser) == ["strong", "weak", "flagged"]
    assert heads["Parameters"].get_attribute("aria-sort") == "descending"
    button.click()
    assert shown(browser) == ["flagged", "weak", "strong"]
    assert heads["standard-1@0.016rms"].get_attribute("aria-sort") is None

    browser.find_element(By.ID, "name").send_keys("K")
    assert shown(browser) == ["weak"]
    assert browser.find_element(By.ID, "count").text == "1 shown"
    points = browser.find_elements(By.CSS_SELECTOR, "svg .point")
    assert [point.is_displayed() for point in points].count(True) == 1
    browser.find_element(By.ID, "name").clear()
    browser.find_element(By.ID, "name").send_keys(" ")
    browser.find_element(By.ID, "most").send_keys("100")
    assert shown(browser) == ["flagged", "weak"]

    browser.find_element(By.LINK_TEXT, "flagged").click()
    assert (
        "Failed check: the gradient is not zero" in browser.find_element(By.TAG_NAME, "body").text
    )
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked and all(address.startswith("file:///") for address in asked)
