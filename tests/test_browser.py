"""The dashboard as people use it: the real command, a real Chromium, the numbers that the model gives."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dashboards.report import write_report
from hardware.profile import load_profile
from perfmodel.decoding import predict
from perfmodel.model_spec import load_spec
from runtime.config import DecodingConfig, Workload
from tests.test_report import results

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
SECONDS = 60  # a shared machine may be slow; nothing sleeps that long when all is well
# Nothing but the page itself may be asked of the network, and nothing of another session reused.
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,2300"
)

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard of this checkout, started as a user starts it, from another folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("dashboard")
    command = [sys.executable, str(ROOT / "ridgepoint.py"), "dashboard", "--headless", "--port", str(port)]
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "RIDGEPOINT_HOME": str(folder)}
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SECONDS
        while not _answers(f"http://127.0.0.1:{port}/_stcore/health"):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)
    assert "Traceback" not in (folder / "log").read_text()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def wait(browser: Any, condition: Any, what: str) -> Any:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(browser, SECONDS, poll_frequency=0.1, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition(), message=what)


def numbers(browser: Any, device: str) -> str:
    """The text of a device's row of numbers; empty while it is not shown."""
    rows = browser.find_elements("css selector", f".st-key-numbers-{device}")
    return " ".join(rows[0].text.split()) if rows else ""


def speedup(device: str, batch: int) -> str:
    """The text that the page must show, from the performance model itself."""
    found = predict(
        load_spec("zaya1-8b"),
        load_profile(device),
        Workload(batch=batch, dtype="bfloat16"),
        DecodingConfig(sampler="two_forward", draft_tokens=16),
        context=2048,
        acceptance_length=6.8,
    )
    return f"speedup {found.speedup_over_autoregressive:.2f}x"


def control(browser: Any, key: str) -> Any:
    return browser.find_element("css selector", f".st-key-explore-{key} input")


def keep_screenshot(browser: Any, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("RIDGEPOINT_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    browser.save_screenshot(str(path))
    assert path.stat().st_size > 20_000  # an empty page takes less


def figures(browser: Any) -> list[Any]:
    """Figures that are drawn, not only there."""
    plots = browser.find_elements("css selector", ".js-plotly-plot")
    stale = browser.find_elements("css selector", "[data-stale=true]")  # of the view before
    return [] if stale else [plot for plot in plots if plot.find_elements("css selector", ".cartesianlayer .xtick")]


def test_device_and_batch_change_the_speedup(address: str, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get(f"{address}/?devices=h100-sxm")
    wait(browser, lambda: speedup("h100-sxm", 1) in numbers(browser, "h100-sxm"), "the default view's speedup")

    control(browser, "devices").send_keys("mi300x", Keys.ENTER)
    wait(browser, lambda: speedup("mi300x", 1) in numbers(browser, "mi300x"), "the second device's speedup")

    batch = control(browser, "batch")
    batch.send_keys(Keys.CONTROL, "a")
    batch.send_keys("256", Keys.ENTER)
    for device in ("h100-sxm", "mi300x"):
        assert speedup(device, 256) != speedup(device, 1)
        wait(browser, lambda d=device: speedup(d, 256) in numbers(browser, d), f"the speedup of {device} at batch 256")
    wait(browser, lambda: len(figures(browser)) >= 2, "two figures")
    wait(browser, lambda: "batch=256" in browser.current_url and "devices=mi300x" in browser.current_url, "the address")
    keep_screenshot(browser, "explore", tmp_path)

    shared = browser.current_url
    browser.get("about:blank")
    browser.get(shared)  # what somebody sees who is sent the link
    wait(browser, lambda: speedup("mi300x", 256) in numbers(browser, "mi300x"), "the shared link's speedup")
    assert control(browser, "batch").get_attribute("value") == "256"


def test_an_impossible_address_is_named(address: str, browser: Any, tmp_path: Path) -> None:
    browser.get(f"{address}/?batch=0")
    alerts = lambda: browser.find_elements("css selector", "[data-testid=stAlert]")  # noqa: E731
    wait(browser, alerts, "an error")
    assert "batch" in alerts()[0].text
    wait(browser, lambda: speedup("h100-sxm", 1) in numbers(browser, "h100-sxm"), "the default view below it")


def test_only_this_machine_is_asked(address: str, browser: Any) -> None:
    """Usage statistics are off and nothing is loaded from elsewhere: the page works on a machine without internet."""
    browser.get(address)
    wait(browser, lambda: len(figures(browser)) >= 2, "two figures")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded
    assert [url for url in loaded if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_report_is_drawn_without_a_network(theme: str, browser: Any, tmp_path: Path) -> None:
    """From a file, with every load refused by the page itself; in both themes text and page differ enough to read."""
    report = write_report(tmp_path / "report.html", results())
    preference = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
    browser.get(report.as_uri())
    wait(browser, lambda: len(figures(browser)) == 7, "seven figures")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    colours = browser.execute_script(
        "const fill = document.querySelector('.xtick text'); return [getComputedStyle(fill).fill,"
        " getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    tick, text, page = ([int(part) for part in re.findall(r"\d+", colour)[:3]] for colour in colours)
    assert tick == text
    assert abs(sum(text) - sum(page)) > 450
    assert (sum(page) > sum(text)) == (theme == "light")
    keep_screenshot(browser, f"report-{theme}", tmp_path)
