"""The accuracy pages: every split has its table, and a row that is not predicted its reason."""

from __future__ import annotations

from benchmarks.accuracy import SPLITS, page
from perfmodel.published.evidence import FOLDER, predicted_rows
from perfmodel.published.rows import read_rows


def test_a_page_has_every_split_and_every_reason() -> None:
    rows = read_rows(FOLDER / "zaya_tidar_measured.csv")
    results = predicted_rows(rows)
    text = page({split: results for split in SPLITS}, "python -m benchmarks.accuracy")
    assert [line for line in text.splitlines() if line.startswith("## Held out by")] == [
        f"## Held out by {split}" for split in SPLITS
    ]
    for reason in {r.status for r in results} - {"predicted"}:
        assert f"| {reason} |" in text
    assert "python -m benchmarks.accuracy" in text
