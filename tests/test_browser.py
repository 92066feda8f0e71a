"""The dashboard as people use it: the real command, a real Chromium, the numbers that the model gives."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.storage import read_studies
from benchmarks.browser import ROOT, browsers, chromium, picture, served, settled, use_theme, wait
from dashboards.report import write_report
from hardware.profile import load_profile, save_profile
from perfmodel.decoding import predict
from perfmodel.model_spec import load_spec
from perfmodel.prediction import Prediction
from runtime.config import DecodingConfig, Workload, replace
from runtime.deployment import load_deployment
from tests.test_report import results

pytestmark = pytest.mark.skipif(browsers() is None, reason="chromium and chromedriver are not installed")
STUDY = "measurements/amd-epyc-2-cores/study.db"  # ships, so that there is one to open


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dashboard")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The dashboard of this checkout, started as a user starts it, from another folder."""
    with served(folder) as found:
        yield found
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="module")
def browser(folder: Path, address: str) -> Iterator[Any]:
    with chromium(folder) as driver:
        yield driver


def open_page(browser: Any, url: str) -> None:
    """Open a view of its own, whatever was shown before: it shows no failure, and nothing scrolls sideways."""
    browser.get("about:blank")
    browser.get(url)
    wait(browser, lambda: settled(browser), f"{url}, drawn")
    wide = "const main = document.querySelector('[data-testid=stMain]'); return main.scrollWidth - main.clientWidth;"
    assert browser.execute_script(wide) <= 0


def find(browser: Any, css: str) -> Any:
    return wait(browser, lambda: browser.find_elements("css selector", css), css)[0]


def control(browser: Any, name: str) -> Any:
    return find(browser, f".st-key-{name} input")


def enter(browser: Any, name: str, text: str) -> None:
    """Type into a control in place of what is there, or choose what begins so, and wait for the page."""
    from selenium.webdriver.common.keys import Keys

    field = control(browser, name)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text, Keys.ENTER)
    wait(browser, lambda: settled(browser), f"the page with {name} {text}")


def shown(browser: Any, css: str) -> str:
    """The text of an element in one line; empty while it is not there."""
    elements = browser.find_elements("css selector", css)
    return " ".join(elements[0].text.split()) if elements else ""


def wait_for_text(browser: Any, css: str, text: str) -> None:
    wait(browser, lambda: text in shown(browser, css), f"{text!r} in {css}")


def drawn(browser: Any, figure: str) -> dict[float, float]:
    """The points of a figure's first trace, as the browser has drawn them."""
    script = (
        f"const trace = document.querySelector('.st-key-{figure} .js-plotly-plot')?.calcdata?.[0];"
        "return (trace || []).map(point => [point.x, point.y]);"
    )
    return {float(x): float(y) for x, y in browser.execute_script(script)}


def keep_picture(browser: Any, name: str, folder: Path, take: Callable[[Any, Path], object] = picture) -> None:
    path = Path(os.environ.get("RIDGEPOINT_ARTIFACTS") or folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    take(browser, path)
    assert path.stat().st_size > 20_000  # an empty page takes less


def prediction(device: str, batch: int) -> Prediction:
    """What the page must show, from the performance model itself."""
    return predict(
        load_spec("zaya1-8b"),
        load_profile(device),
        Workload(batch=batch, dtype="bfloat16"),
        DecodingConfig(sampler="two_forward", draft_tokens=16),
        context=2048,
        acceptance_length=6.8,
    )


def test_device_model_and_batch_change_the_speedup(address: str, browser: Any, folder: Path) -> None:
    open_page(browser, f"{address}/?devices=h100-sxm&model=zaya1-74b-preview&batch=2")
    enter(browser, "explore-devices", "mi300x")
    enter(browser, "explore-model", "zaya1-8b")
    for batch in (1, 64):
        enter(browser, "explore-batch", str(batch))
        for device in ("h100-sxm", "mi300x"):
            wanted = prediction(device, batch).speedup_over_autoregressive
            wait_for_text(browser, f".st-key-numbers-{device}", f"speedup {wanted:.2f}x")
        wanted = prediction("h100-sxm", batch).speedup_over_autoregressive
        for figure, place in (("speedup-batch", batch), ("speedup-context", 2048)):
            assert drawn(browser, figure)[place] == pytest.approx(wanted)
    assert all(part in browser.current_url for part in ("batch=64", "devices=mi300x", "model=zaya1-8b"))
    keep_picture(browser, "explore", folder)

    shared = browser.current_url
    # Usage statistics are off and nothing is loaded from elsewhere: it works on a machine without internet.
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded
    assert [url for url in loaded if not url.startswith((address, "data:", "blob:"))] == []

    open_page(browser, shared)  # what somebody sees who is sent the link
    wanted = prediction("mi300x", 64).speedup_over_autoregressive
    assert f"speedup {wanted:.2f}x" in shown(browser, ".st-key-numbers-mi300x")
    assert control(browser, "explore-batch").get_attribute("value") == "64"
    assert browser.current_url == shared


def test_a_profile_is_uploaded_and_offered_everywhere(address: str, browser: Any, folder: Path) -> None:
    broken, good = folder / "broken.yaml", folder / "mine.yaml"
    save_profile(replace(load_profile("mi300x"), name="mine", vendor="somebody"), good)
    broken.write_text(re.sub(r"(?m)^launch_seconds: .*", "launch_seconds: soon", good.read_text(), count=1))
    open_page(browser, f"{address}/hardware?tab=file")
    find(browser, "input[type=file]").send_keys(str(broken))
    wait_for_text(browser, "[data-testid=stAlert]", "launch_seconds: must be a float, but is 'soon'")
    find(browser, "input[type=file]").send_keys(str(good))
    wait_for_text(browser, ".st-key-hardware-save", "Save")
    find(browser, ".st-key-hardware-save button").click()
    wait(browser, lambda: (folder / "home" / "hardware" / "mine.yaml").exists(), "the saved profile")
    keep_picture(browser, "hardware", folder)

    open_page(browser, address)
    enter(browser, "explore-devices", "mine")
    wait_for_text(browser, ".st-key-numbers-mine", "speedup")


def test_a_study_is_opened_and_its_policy_downloaded(address: str, browser: Any, folder: Path) -> None:
    (study,) = (s for s in read_studies(ROOT / STUDY) if s.name == "zaya-nano batch=8 context=768")
    assert study.decision and study.decision.comparison
    open_page(browser, f"{address}/tuning")
    enter(browser, "tuning-study", study.name)
    wait_for_text(browser, "[data-testid=stMain]", f"against default {study.decision.comparison.ratio:.2f}x")
    assert drawn(browser, "tuning-history")

    keep_picture(browser, "tuning", folder)

    open_page(browser, f"{address}/export")
    keep_picture(browser, "export", folder)
    find(browser, ".st-key-export-download button").click()
    path = folder / "downloads" / "deployment.yaml"
    wait(browser, path.exists, "the downloaded deployment")
    assert len(load_deployment(path).rules) == 4  # what the 15-minute search of the README decided, bucket by bucket


def test_measurements_are_shown(address: str, browser: Any, folder: Path) -> None:
    open_page(browser, f"{address}/predicted-versus-measured?section=errors")
    assert drawn(browser, "errors")
    open_page(browser, f"{address}/predicted-versus-measured")
    assert drawn(browser, "predicted-measured")
    keep_picture(browser, "predicted-versus-measured", folder)


def test_an_impossible_address_is_named(address: str, browser: Any) -> None:
    open_page(browser, f"{address}/?batch=0")
    assert "batch" in shown(browser, "[data-testid=stAlert]")
    wanted = prediction("h100-sxm", 1).speedup_over_autoregressive  # the default view below it
    assert f"speedup {wanted:.2f}x" in shown(browser, ".st-key-numbers-h100-sxm")


def test_the_report_is_drawn_without_a_network(browser: Any, tmp_path: Path) -> None:
    """From a file, with every load refused by the page itself; in both themes text and page differ enough to read."""
    report = write_report(tmp_path / "report.html", results())
    for theme in ("light", "dark"):
        use_theme(browser, theme)
        browser.get_log("browser")  # of the page before
        browser.get(report.as_uri())
        wait(
            browser, lambda: browser.find_elements("css selector", ".js-plotly-plot .cartesianlayer .xtick"), "figures"
        )
        assert len(browser.find_elements("css selector", ".js-plotly-plot .cartesianlayer")) == 11
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        colours = browser.execute_script(
            "const fill = document.querySelector('.xtick text'); return [getComputedStyle(fill).fill,"
            " getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('.bartext-outside')).fill]"
        )
        tick, text, page, beside_bar = ([int(part) for part in re.findall(r"\d+", colour)[:3]] for colour in colours)
        assert tick == text == beside_bar
        cells = "return [...document.querySelectorAll('.heatmap-label text')].map(cell => getComputedStyle(cell).fill)"
        assert len(set(browser.execute_script(cells))) == 2  # light on dark cells, dark on light ones, in both themes
        assert abs(sum(text) - sum(page)) > 450
        assert (sum(page) > sum(text)) == (theme == "light")
        keep_picture(browser, f"report-{theme}", tmp_path, lambda b, path: b.save_screenshot(str(path)))
    use_theme(browser, "light")
