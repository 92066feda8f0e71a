"""How fast the dashboard answers: from the command to the first page, each page, and each control of each page.

python -m benchmarks.dashboard [--rounds 3] [--starts 3] [--page PART] [--out FILE.json]

A real headless Chromium of 1280 x 900 at each page's default view. A time ends with the last change of the page's main
part, when the script has finished, nothing of the view before is left and every figure is drawn; it is taken by the
browser's own clock, from the navigation, or from the key press or click. Each round of a control sets another value, so
that the caches of the server do not answer; the worst is that of the values that were new.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import command, fail_in_one_line
from dashboards.comparison import FILTERS
from hardware.files import UserError, write_atomic
from hardware.fingerprint import fingerprint, git_commit
from runtime.config import require

ROOT = Path(__file__).parents[1]
SECONDS = 30.0  # over it, something is wrong
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)
# In the browser: when the last key or click was, when the page last changed, and whether the script has run since.
WATCH = """
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
  w.settled = () => {
    const app = document.querySelector('.stApp'), all = s => [...document.querySelectorAll(s)];
    const quiet = performance.now() - w.last > 400 && app && app.dataset.testScriptState === 'notRunning' && w.ran;
    if (!quiet || all('[data-stale=true], [data-testid=stSkeleton]').length) return null;
    if (!all('.stPlotlyChart').every(c => c.querySelector('.main-svg'))) return null;
    return [(w.last - w.began) / 1000, (w.served - w.began) / 1000, all('[data-testid=stException]').length];
  };
})();
"""


@dataclass(frozen=True)
class Control:
    """A widget to change.

    page: a word of its title, with which its key begins; key: the rest of that; values: one a round, in turn.
    kind: which of ACTIONS. query: of the address at which it is there to be changed.
    """

    page: str
    key: str
    kind: str
    values: tuple[str, ...]
    query: str = ""


# A line each. A value is typed, chosen from a list by its text, or clicked at by its text; "next" goes on so many
# places in a list; of a checkbox it is ignored.
CONTROLS = (
    Control("explore", "devices", "choose", ("h200", "b200", "a100")),
    Control("explore", "model", "choose", ("zaya-nano", "zaya1-8b"), "context=256"),
    Control("explore", "engine", "choose", ("vllm", "ridgepoint-eager", "zyphra-vllm")),
    Control("explore", "dtype", "choose", ("float16", "bfloat16", "default")),
    Control("explore", "batch", "type", ("3", "48", "200", "7", "96")),
    Control("explore", "context", "type", ("1000", "9000", "33000", "700", "5000")),
    Control("explore", "sampler", "choose", ("single_forward", "denoising", "autoregressive")),
    Control("explore", "draft_tokens", "type", ("8", "12", "24", "10", "20")),
    Control("explore", "levels", "type", ("0,4", "0,2,8", "0,1"), "sampler=single_forward"),
    Control("explore", "denoising_steps", "type", ("2", "4", "8"), "sampler=denoising"),
    Control("explore", "verify", "check", ("",), "sampler=denoising"),
    Control("explore", "acceptance_length", "type", ("2.5", "4.4", "8.3", "1.7", "5.1")),
    Control("explore", "mixing_weight", "type", ("0.5", "0.3", "0.8")),
    Control("explore", "section", "click", ("map", "time", "change")),
    Control("explore", "batch", "type", ("3", "48", "200", "7", "96"), "section=map"),
    Control("explore", "batch", "type", ("5", "40", "150", "9", "90"), "section=changes"),
    *(Control("measured", name, "next", ("1",)) for name in FILTERS),
    Control("measured", "intervals", "check", ("",)),
    Control("measured", "point", "next", ("1",)),
    Control("measured", "by", "click", ("family", "device", "engine", "source")),
    Control("tuning", "study", "next", ("1",)),
    Control("tuning", "section", "click", ("settings", "predictions", "failures", "result")),
    Control("tuning", "progress", "choose", ("time", "settings")),
    Control("hardware", "tab", "click", ("file", "form", "your", "compare")),
    Control("hardware", "devices", "choose", ("h200", "a100", "mi325x")),
    Control("hardware", "dtype", "choose", ("float16", "float32", "bfloat16")),
    Control("hardware", "differing", "check", ("",)),
    Control("export", "target", "choose", ("vllm", "sglang", "native")),
    Control("export", "study", "next", ("1",)),
    Control("export", "batch", "choose", ("8", "1")),
    Control("export", "context", "choose", ("768", "256")),
)


# --- the server and the browser


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, float]]:
    """A fresh server: its address, and the seconds from the command to the server's first answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(ROOT / "ridgepoint.py"), "dashboard", "--headless", "--port", str(port)]
    environment = {**os.environ, "RIDGEPOINT_HOME": str(folder)}
    with (folder / "server.log").open("w") as log:
        began = time.perf_counter()
        server = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not _healthy(port):
            late = server.poll() is not None or time.perf_counter() - began > SECONDS
            require(not late, f"the dashboard must start, but: {(folder / 'server.log').read_text()[-500:]}")
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}", time.perf_counter() - began
    finally:
        server.terminate()
        server.wait()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextmanager
def browsing(folder: Path) -> Iterator[Any]:
    """A Chromium that watches itself. UserError where there is none."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        raise UserError("chromium and chromedriver must be installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        yield browser
    finally:
        browser.quit()


def settled(browser: Any) -> tuple[float, float]:
    """Wait until the page is done; seconds since the navigation, the key press or the click: all, and to the script's
    end."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found = browser.execute_script("return window.ridgepoint?.settled()")
        if found:
            require(not found[2], "the page shows an exception")
            return float(found[0]), float(found[1])
        time.sleep(0.1)
    raise UserError("the page was not done in time")


def opened(browser: Any, address: str) -> tuple[float, float]:
    """Go to an address; the seconds until it is drawn, and to the script's end."""
    browser.get("about:blank")
    browser.get(address)
    return settled(browser)


# --- what is done to a control


def _type(browser: Any, place: str, value: str) -> None:
    from selenium.webdriver.common.keys import Keys

    field = browser.find_element("css selector", f"{place} :is(input, textarea)")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(value, Keys.ENTER)


def _choose(browser: Any, place: str, value: str) -> None:
    from selenium.webdriver.common.keys import Keys

    field = browser.find_element("css selector", f"{place} input")
    field.click()
    field.send_keys(value)
    time.sleep(0.3)  # the list filters itself
    field.send_keys(Keys.ENTER)


def _next(browser: Any, place: str, value: str) -> None:
    from selenium.webdriver.common.keys import Keys

    field = browser.find_element("css selector", f"{place} input")
    field.click()
    time.sleep(0.3)  # the list opens
    field.send_keys(*[Keys.ARROW_DOWN] * int(value), Keys.ENTER)


def _click(browser: Any, place: str, value: str) -> None:
    buttons = browser.find_elements("css selector", f"{place} button")
    matching = [b for b in buttons if value.lower() in b.text.lower()]
    require(bool(matching), f"{place} must have a button {value!r}, but has {[b.text for b in buttons]}")
    browser.execute_script("arguments[0].click()", matching[0])


def _check(browser: Any, place: str, value: str) -> None:
    browser.execute_script("arguments[0].click()", browser.find_element("css selector", f"{place} input"))


ACTIONS: dict[str, Callable[[Any, str, str], None]] = {
    "type": _type, "choose": _choose, "next": _next, "click": _click, "check": _check,
}  # fmt: skip


# --- measuring


def pages(browser: Any) -> dict[str, str]:
    """The addresses of the pages by their titles, in their order, as the open page offers them."""
    links = browser.find_elements("css selector", "[data-testid=stSidebarNavLink]")
    return {link.text.strip(): link.get_attribute("href") for link in links}


def starts(count: int) -> list[dict[str, float]]:
    """Fresh servers: seconds to the first answer, and of the first page in a browser that is open already."""
    found = []
    for number in range(count):
        with (
            tempfile.TemporaryDirectory() as name,
            browsing(Path(name)) as browser,
            serving(Path(name)) as (url, seconds),
        ):
            found.append({"server_seconds": seconds, "first_page_seconds": opened(browser, url)[0]})
        _say(f"start {number + 1}: {found[-1]}")
    return found


def page_times(browser: Any, url: str, rounds: int, part: str) -> list[dict[str, Any]]:
    """Each page: by its address, as somebody who follows a link waits for it; and from another page, by the menu."""
    found = []
    titles = list(pages(browser))
    for title, address in pages(browser).items():
        if part not in title.lower():
            continue
        other = titles[0] if title != titles[0] else titles[-1]

        def follow(address: str = address) -> list[tuple[float, float]]:
            return [opened(browser, address) for _ in range(rounds)]

        def change(title: str = title, other: str = other) -> list[tuple[float, float]]:
            return [(_go(browser, other), _go(browser, title))[1] for _ in range(rounds)]

        found.append({"page": title, "how": "by its address", **_guarded(title, follow)})
        found.append({"page": title, "how": "by the menu", **_guarded(f"{title}, by the menu", change)})
    return found


def _go(browser: Any, title: str) -> tuple[float, float]:
    for link in browser.find_elements("css selector", "[data-testid=stSidebarNavLink]"):
        if link.text.strip() == title:
            browser.execute_script("arguments[0].click()", link)
            return settled(browser)
    raise UserError(f"the menu must have the page {title!r}")


def control_times(browser: Any, url: str, rounds: int, part: str) -> list[dict[str, Any]]:
    """Each control of the pages with `part` in their name."""
    found = []
    places = pages(browser)
    for control in CONTROLS:
        if part not in control.page:
            continue
        title = next((t for t in places if control.page in t.lower()), "")
        name = f"{control.page}: {control.key}" + (f" at {control.query}" if control.query else "")
        if not title:
            found.append({"control": name, "problem": "there is no such page"})
            continue

        def run(control: Control = control, address: str = places[title]) -> list[tuple[float, float]]:
            opened(browser, f"{address}?{control.query}")
            times = []
            for number in range(rounds):
                place = f".st-key-{control.page}-{control.key}"
                ACTIONS[control.kind](browser, place, control.values[number % len(control.values)])
                times.append(settled(browser))
            return times

        found.append({"control": name, **_guarded(name, run)})
    return found


def _guarded(name: str, run: Callable[[], list[tuple[float, float]]]) -> dict[str, Any]:
    """Its samples, median and worst; or why there are none, which ends nothing else."""
    from selenium.common.exceptions import WebDriverException

    try:
        seconds, script = zip(*run(), strict=True)
    except (UserError, WebDriverException) as error:
        reason = str(error).splitlines()[0]
        _say(f"{name}: {reason}")
        return {"problem": reason}
    median = statistics.median(seconds)
    _say(f"{name}: {median:.2f} s, worst {max(seconds):.2f} s; the script {statistics.median(script):.2f} s")
    found = {"seconds_median": median, "seconds_worst": max(seconds), "seconds": list(seconds)}
    return {**found, "script_seconds": list(script)}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- the command


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    chosen = _arguments(arguments)
    require(chosen.rounds >= 1 and chosen.starts >= 0, "rounds >= 1 and starts >= 0 must hold")
    load = os.getloadavg()[0]
    found = starts(chosen.starts)
    with tempfile.TemporaryDirectory() as name, browsing(Path(name)) as browser, serving(Path(name)) as (url, _):
        opened(browser, url)
        document = {
            "command": command("benchmarks.dashboard", arguments),
            "commit": git_commit(Path(__file__)),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "device": fingerprint(),
            "browser": f"Chromium {browser.capabilities['browserVersion']}, headless, 1280 x 900",
            "load_average": load,  # of the last minute: other work slows these figures down
            "starts": found,
            "pages": page_times(browser, url, chosen.rounds, chosen.page),
            "controls": control_times(browser, url, chosen.rounds, chosen.page),
        }
    if chosen.out is not None:
        write_atomic(chosen.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1) if chosen.json else "\n".join(_table(document)))
    return 0


def _table(document: dict[str, Any]) -> list[str]:
    lines = ["| what | median | worst |", "| --- | ---: | ---: |"]
    for key, label in (("server_seconds", "command to server"), ("first_page_seconds", "first page of a server")):
        seconds = [start[key] for start in document["starts"]]
        lines += [_row(label, seconds)] if seconds else []
    lines += [_row(f"{p['page']}, {p['how']}", p.get("seconds", ()), p.get("problem", "")) for p in document["pages"]]
    lines += [_row(c["control"], c.get("seconds", ()), c.get("problem", "")) for c in document["controls"]]
    return [*lines, f"\nload average before: {document['load_average']:.1f}"]


def _row(label: str, seconds: Sequence[float], problem: str = "") -> str:
    if not seconds:
        return f"| {label} | {problem} | |"
    return f"| {label} | {statistics.median(seconds):.2f} s | {max(seconds):.2f} s |"


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each page and control")
    parser.add_argument("--starts", type=int, default=3, help="fresh servers")
    parser.add_argument("--page", default="", help="only pages with this in their title, and their controls")
    parser.add_argument("--out", type=Path, help="JSON file for the whole result")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
