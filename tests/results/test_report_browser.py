"""The report in headless Chromium: no errors, marks in every figure, the width of a phone."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
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
        yield found
        found.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=30)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_works_at_desktop_and_at_phone_width(browser, reported, width):
    path = reported[0].path / "report" / "index.html"
    browser.cdp(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=900, deviceScaleFactor=1, mobile=width < 500,
    )  # fmt: skip
    browser.call("POST", "/url", {"url": path.absolute().as_uri()})
    found = browser.call("POST", "/execute/async", {"script": FIND, "args": []})
    assert len(found["marks"]) >= 15
    assert all(found["marks"].values()), found["marks"]
    assert found["wider"] <= 0
    assert browser.call("POST", "/se/log", {"type": "browser"}) == []
