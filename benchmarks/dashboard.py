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
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.browser import HEIGHT, WIDTH, chromium, served, settled, wait
from benchmarks.common import command, fail_in_one_line
from dashboards.comparison import FILTERS
from hardware.files import UserError, write_atomic
from hardware.fingerprint import fingerprint, git_commit
from runtime.config import require

SECONDS = 30.0  # over it, something is wrong
QUIET_SECONDS = 0.4  # without a change: what comes later would not be counted


@dataclass(frozen=True)
class Control:
    """A widget to change.

    page: a word of its title, with which its key begins; key: the rest of that; values: one a round, in turn.
    kind: which of ACTIONS. query: of the address at which it is there to be changed. rounds: at most, of a list.
    """

    page: str
    key: str
    kind: str
    values: tuple[str, ...]
    query: str = ""
    rounds: int = 100


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
    *(Control("measured", name, "next", ("1",), rounds=2) for name in FILTERS),
    Control("measured", "intervals", "check", ("",)),
    Control("measured", "point", "next", ("1",)),
    Control("measured", "section", "click", ("errors", "models", "every")),
    Control("measured", "by", "click", ("family", "device", "engine", "source"), "section=errors"),
    *(Control("measured", name, "next", ("1",), "section=errors", 2) for name in ("families", "devices")),
    Control("tuning", "study", "next", ("1",), rounds=3),
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


# --- the browser


def done(browser: Any) -> tuple[float, float]:
    """Wait until the page is done; seconds to its last change, and to the script's end."""
    found: tuple[float, float] = wait(browser, lambda: settled(browser, QUIET_SECONDS), "the page, done", SECONDS)
    return found


def opened(browser: Any, address: str) -> tuple[float, float]:
    """Go to an address; the seconds until it is drawn, and to the script's end."""
    browser.get("about:blank")
    browser.get(address)
    return done(browser)


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
        with tempfile.TemporaryDirectory() as name, chromium(Path(name)) as browser:
            began = time.perf_counter()
            with served(Path(name)) as url:
                seconds = time.perf_counter() - began
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
            return done(browser)
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
            for number in range(min(rounds, control.rounds)):
                place = f".st-key-{control.page}-{control.key}"
                ACTIONS[control.kind](browser, place, control.values[number % len(control.values)])
                times.append(done(browser))
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
    with tempfile.TemporaryDirectory() as name, chromium(Path(name)) as browser, served(Path(name)) as url:
        opened(browser, url)
        document = {
            "command": command("benchmarks.dashboard", arguments),
            "commit": git_commit(Path(__file__)),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "device": fingerprint(),
            "browser": f"Chromium {browser.capabilities['browserVersion']}, headless, {WIDTH} x {HEIGHT}",
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
