"""A headless Chromium and the report of a run.

Without chromium or chromedriver, the tests in this folder are skipped, and say so.
"""

import re
import shutil

import pytest
from browsing import requests
from report_input import build
from report_page import Report, write
from selenium import webdriver

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,1000"),
)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    chromedriver = shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(chromedriver)) as driver:
        driver.get("about:blank")
        requests(driver)  # those of Chromium's own first page
        yield driver


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Samples, questions and the path of their report."""
    samples, questions = build()
    return samples, questions, write(tmp_path_factory.mktemp("run"), samples, questions)


@pytest.fixture
def page(browser):
    """The page; afterwards the console must be empty, and nothing outside asked for."""
    requests(browser)  # those of another test's pages
    yield Report(browser)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []
    asked = requests(browser)
    assert any(address.startswith("file:///") for address in asked)
    inside = re.compile(r"data:|file:///.*/report\.html(#|$)")
    assert [address for address in asked if not inside.match(address)] == []
