"""Pictures of the dashboard's pages, as README shows them: `python -m benchmarks.screenshots --out docs/screenshots`.

Each page is shown as a link describes it, by a server and a browser of its own. To be run again when a page changes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.browser import chromium, picture, served, settled, wait
from benchmarks.common import fail_in_one_line

HEIGHT = 1400
# What a name of a picture shows: the page, and the view in its address.
VIEWS = {
    "explore": "?devices=h100-sxm&devices=mi300x&engine=zyphra-vllm&acceptance=aime25-on&batch=16",
    "explore-map": "?devices=mi300x&engine=zyphra-vllm&acceptance=aime25-on&batch=16&section=map",
    "predicted-versus-measured": "predicted-versus-measured",
    "tuning": "tuning",
    "hardware": "hardware",
    "export": "export",
}


def main(arguments: list[str] | None = None) -> int:
    """Write a picture of the top of every page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/screenshots"), help="folder of the PNG files")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with served(folder) as address, chromium(folder, theme=options.theme) as browser:
            for name, view in VIEWS.items():
                browser.get(f"{address}/{view}")
                wait(browser, lambda: settled(browser), f"{name}, drawn")
                path = picture(browser, options.out / f"{name}.png", HEIGHT)
                print(f"written: {path} ({path.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    raise SystemExit(fail_in_one_line(main))
