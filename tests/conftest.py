"""Rules for the whole test run."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several busy threads on few cores stall each other
gc.disable()  # until everything is imported: what torch, transformers and 5,000 tests consist of is no garbage
hypothesis.settings.register_profile("any time", hypothesis.settings(), deadline=None)  # machines are busy
hypothesis.settings.load_profile("any time")

MAIN = sys.modules["__main__"]
NEEDS_GPU = "needs a GPU"
Report = pytest.TestReport | pytest.CollectReport


def _forbid_skip(report: Report) -> Report:
    """In CI (RIDGEPOINT_CI=1) everything a test needs is installed, so a skip is a test that was lost: make it fail.

    Only what needs a GPU may be skipped there, with a reason that starts with "needs a GPU".
    """
    if os.environ.get("RIDGEPOINT_CI") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith(NEEDS_GPU):
        report.outcome = "failed"
        report.longrepr = f"{reason}: in CI only tests that say {NEEDS_GPU!r} may be skipped"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Report, Report]:
    return _forbid_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Report, Report]:
    return _forbid_skip((yield))


def pytest_collection_finish() -> None:
    """Collect garbage of the tests alone: walking through the libraries' objects again and again took a sixth of all
    time."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def pytest_runtest_teardown() -> None:
    """Streamlit's AppTest leaves its script as the main module, which a process spawned by a later test would run."""
    sys.modules["__main__"] = MAIN
