"""The dashboard, started as a user starts it, in a real Chromium: for its test, its response times and its pictures."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hardware.files import UserError
from runtime.config import require

ROOT = Path(__file__).parents[1]
SECONDS = 60.0  # a shared machine may be slow; nothing sleeps that long when all is well
WIDTH, HEIGHT = 1280, 900  # the narrowest window that every page must suit
# Nothing but the page itself may be asked of the network, and nothing of another session reused.
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)


def browsers() -> tuple[str, str] | None:
    """The paths of Chromium and of its driver; None where either is missing."""
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


@contextmanager
def served(folder: Path, **environment: str) -> Iterator[str]:
    """The address of a dashboard that is started in `folder`, which is its user's folder too; its log is in there."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "ridgepoint.py"), "dashboard", "--headless", "--port", str(port)]
    home = {"RIDGEPOINT_HOME": str(folder / "home")}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **home, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + SECONDS
        while not _answers(f"http://127.0.0.1:{port}/_stcore/health"):
            if server.poll() is not None or time.monotonic() > end:
                raise UserError(f"the dashboard did not start: {(folder / 'log').read_text()}")
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextmanager
def chromium(folder: Path, *, height: int = HEIGHT, theme: str = "light") -> Iterator[Any]:
    """A headless browser with its profile and its downloads below `folder`. UserError where none is installed."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    found = browsers()
    if found is None:
        raise UserError("chromium and chromedriver must be installed, but are not")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in [*_FLAGS.split(), f"--window-size={WIDTH},{height}", f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(flag)
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=Service(found[1]))
    try:
        use_theme(driver, theme)
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
        yield driver
    finally:
        driver.quit()


def use_theme(browser: Any, theme: str) -> None:
    """Prefer light or dark pages, as a system's setting does."""
    preference = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)


def wait(browser: Any, condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """What the condition gives as soon as it is true. A timeout names `what` was waited for."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(browser, seconds, poll_frequency=0.02, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition(), message=what)


# In the browser: when the last key or click was, when the page last changed, and whether the script has run since.
_WATCH = """
(() => {
  const w = window.ridgepoint = {began: 0, last: 0, served: 0, ran: false};
  const begin = () => { w.began = w.last = performance.now(); w.ran = false; };
  document.addEventListener('keydown', e => { if (e.key === 'Enter') begin(); }, true);
  document.addEventListener('click', begin, true);
  new MutationObserver(records => {
    const app = document.querySelector('.stApp');
    if (!app) return;
    const running = app.dataset.testScriptState !== 'notRunning';
    if (app.dataset.testScriptState === 'running') w.ran = true, w.served = 0;
    if (!running && w.ran && !w.served) w.served = performance.now();
    const inside = n => n === app || (n.nodeType === 1 ? n : n.parentElement)?.closest('[data-testid=stMain]');
    if (records.some(r => inside(r.target))) w.last = performance.now();
  }).observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
  w.settled = quietMilliseconds => {
    const app = document.querySelector('.stApp'), all = s => [...document.querySelectorAll(s)];
    const quiet = performance.now() - w.last > quietMilliseconds && w.ran;
    if (!quiet || app?.dataset.testScriptState !== 'notRunning') return null;
    if (all('[data-stale=true], [data-testid=stSkeleton]').length) return null;
    if (!all('.stPlotlyChart').every(c => c.querySelector('.main-svg'))) return null;
    return [(w.last - w.began) / 1000, (w.served - w.began) / 1000, all('[data-testid=stException]').length];
  };
})();
"""


def settled(browser: Any, quiet_seconds: float = 0.1) -> tuple[float, float] | None:
    """When the page was done: seconds from navigation, key press or click to its last change, and to its script's end.

    None while it is not: the script has to run and end, everything of the view before has to go, every figure has to be
    drawn, and nothing to change for a while. UserError where an exception is shown.
    """
    found = browser.execute_script(f"return window.ridgepoint?.settled({1000 * quiet_seconds})")
    if not found:
        return None
    require(not found[2], "the page shows an exception")
    return float(found[0]), float(found[1])


_WHOLE = """
const parts = document.querySelectorAll('[data-testid=stMain], [data-testid=stSidebarContent], body');
return Math.max(...[...parts].map(part => part.scrollHeight));
"""


def picture(browser: Any, path: Path, height: int | None = None) -> Path:
    """A PNG of the page from its top; None: the whole page, also what lies below the window."""
    import base64

    tall = height or int(browser.execute_script(_WHOLE))
    size = {"width": WIDTH, "height": tall, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        wait(browser, lambda: settled(browser), f"the page {tall} pixels high")
        data = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(data))
    return path
