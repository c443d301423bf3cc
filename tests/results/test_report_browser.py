"""The report in headless Chromium: no errors, marks in every figure, on a desktop, on a phone and
on paper. `.ci/run` installs the browser and sets EKD_BROWSER, without which a machine that has
none skips these tests."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not ((CHROMIUM and DRIVER) or os.environ.get("EKD_BROWSER")),
    reason="needs Debian's chromium and chromium-driver",
)

# The marks that plotly draws: points, lines, bars, areas of a contour, images of a heat map.
MARKS = ".points path, .js-line, .bars path, .contourfill path, .heatmaplayer image"
FIND = f"""
const done = arguments[0];
drawAllCharts().then(() => setTimeout(() => done({{
  marks: Object.fromEntries([...document.querySelectorAll(".chart")].map(
    (node) => [node.id, node.querySelectorAll({json.dumps(MARKS)}).length])),
  wider: document.documentElement.scrollWidth - window.innerWidth,
  ran: typeof window.alerted,
}}), 300));
"""
# How wide each figure is drawn, and how much room it has; the whole page's width.
WIDTHS = """
return {
  page: document.documentElement.scrollWidth,
  charts: [...document.querySelectorAll(".chart")].map((node) => [
    node.id, node.querySelector(".main-svg").getBoundingClientRect().width, node.clientWidth]),
  tables: [...document.querySelectorAll(".scroll")].filter((node) => node.offsetParent).map(
    (node) => node.scrollWidth - node.clientWidth),
  ink: getComputedStyle(document.querySelector(".chart .xtick text")).fill,
};
"""
READY = "const done = arguments[0]; chartsReady.then(() => done());"
# axe-core's findings: rule, how bad, and the elements.
AXE = """
const done = arguments[0];
drawAllCharts().then(() => axe.run(document)).then((found) => done(found.violations.map(
  (rule) => [rule.id, rule.impact, rule.nodes.map((node) => node.html.slice(0, 200))])));
"""
SHEET = 687  # CSS pixels between the margins of A4
BLACKISH = "rgb(68, 68, 68)"  # --soft on paper


class Browser:
    """Just enough of the WebDriver protocol."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.session = ""

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.root}{self.session}{path}", data=data, method=method,
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def cdp(self, command, **params):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM and DRIVER, "EKD_BROWSER is set and chromium or chromedriver is not there"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        found = Browser(port)
        for _ in range(120):
            with contextlib.suppress(OSError):
                found.call("GET", "/status")
                break
            time.sleep(0.5)
        options = {"binary": CHROMIUM, "args": ["--headless=new", "--no-sandbox", "--disable-gpu",
                                               "--disable-dev-shm-usage"]}  # fmt: skip
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL"}}  # fmt: skip
        made = found.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        found.session = f"/session/{made['sessionId']}"
        found.call("POST", "/timeouts", {"script": 110_000, "pageLoad": 110_000})
        yield found
        found.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def opened(browser, study, width, scheme="light"):
    path = study.path / "report" / "index.html"
    browser.cdp(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=900, deviceScaleFactor=1, mobile=width < 500,
    )  # fmt: skip
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.cdp("Emulation.setEmulatedMedia", media="", features=features)
    browser.call("POST", "/url", {"url": path.absolute().as_uri()})
    browser.call("POST", "/execute/async", {"script": READY, "args": []})


def told(browser, script):
    return browser.call("POST", "/execute/sync", {"script": script, "args": []})


@pytest.mark.quick_ids("390")
@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_works_at_desktop_and_at_phone_width(browser, reported, width):
    opened(browser, reported[0], width)
    found = browser.call("POST", "/execute/async", {"script": FIND, "args": []})
    assert len(found["marks"]) >= 15
    assert all(found["marks"].values()), found["marks"]
    assert found["wider"] <= 0
    assert browser.call("POST", "/se/log", {"type": "browser"}) == []


@pytest.mark.parametrize(
    ("width", "scheme"), [(1440, "light"), pytest.param(390, "dark", marks=pytest.mark.slow)]
)
def test_axe_finds_nothing_that_keeps_anybody_out(browser, reported, width, scheme):
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None and not os.environ.get("EKD_BROWSER"):
        pytest.skip("needs axe-playwright-python")
    assert package and package.origin, "EKD_BROWSER is set and axe-playwright-python is not there"
    opened(browser, reported[0], width, scheme)
    told(browser, Path(package.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    assert browser.call("POST", "/execute/async", {"script": AXE, "args": []}) == []


def test_a_browser_that_cannot_unpack_shows_the_figures_in_words(browser, reported):
    hide = {"source": "delete globalThis.DecompressionStream"}
    added = browser.cdp("Page.addScriptToEvaluateOnNewDocument", **hide)["identifier"]
    try:
        opened(browser, reported[0], 1440)
        text = told(browser, "return document.getElementById('board').innerText")
        assert "Test accuracy" in text and "%" in text
    finally:
        browser.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=added)


@pytest.mark.quick_ids("390")
@pytest.mark.parametrize(("width", "scheme"), [(1440, "dark"), (390, "light")])
def test_figures_fit_the_sheet_when_the_page_is_printed(browser, reported, width, scheme):
    """Also those that were never scrolled to; in dark ink, whatever the screen's is."""
    opened(browser, reported[0], width, scheme)
    told(browser, "window.dispatchEvent(new Event('beforeprint'))")
    shown = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.cdp("Emulation.setEmulatedMedia", **shown)
    browser.cdp(
        "Emulation.setDeviceMetricsOverride",
        width=SHEET, height=970, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    found = told(browser, WIDTHS)
    assert len(found["charts"]) >= 15
    assert found["page"] <= SHEET
    assert len(found["tables"]) >= 4 and max(found["tables"]) <= 0
    for name, drawn, room in found["charts"]:
        assert 250 < drawn <= room + 1, name
    assert found["ink"] == BLACKISH
    # Back on the screen, the figures are as wide as it is.
    told(browser, "window.dispatchEvent(new Event('afterprint'))")
    browser.cdp("Emulation.setEmulatedMedia", media="", features=shown["features"])
    assert told(browser, WIDTHS)["ink"] != BLACKISH
    assert browser.call("POST", "/se/log", {"type": "browser"}) == []


@pytest.mark.slow
def test_the_printed_page_is_some_sheets_of_paper(browser, reported):
    opened(browser, reported[0], 1440)
    printed = browser.cdp("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"]
    content = base64.b64decode(printed)
    assert content.startswith(b"%PDF") and len(content) > 100_000
    assert 8 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 16
