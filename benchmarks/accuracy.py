"""How far predictions are from published measurements that they were not fitted to, as the pages of docs/accuracy.

Every split of `ridgepoint validate` in turn: rows held out with their series, with their source, one by one. Every
single row, held out with its series, stands in rows.csv, which the dashboard shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import command, fail_in_one_line
from dashboards.pairs import published_text
from hardware.files import write_atomic
from perfmodel.published.evidence import (
    PREDICTED,
    Group,
    Result,
    direction,
    held_out_rows,
    predicted_rows,
    shipped_rows,
    statuses,
    summarise,
)
from perfmodel.published.fits import Split

SPLITS: tuple[Split, ...] = ("series", "source", "point")
COLUMNS = ("", "rows", "median error", "mean error", "bias", "in interval", "below the bound")
_SHOWN_WORST = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Write `tables.md` and `rows.csv` to a folder; about a minute on one core."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/accuracy"), help="folder (default: docs/accuracy)")
    given = parser.parse_args(argv)
    rows = shipped_rows()
    found = {split: held_out_rows(rows, split) for split in SPLITS}
    text = page(found, command("benchmarks.accuracy", None if argv is None else list(argv)))
    print(f"written: {write_atomic(given.out / 'tables.md', text)}")
    lines = published_text(found["series"], predicted_rows(rows))
    print(f"written: {write_atomic(given.out / 'rows.csv', lines)}")
    return 0


def page(found: dict[Split, list[Result]], written_by: str) -> str:
    """The tables as Markdown."""
    series = found["series"]
    parts = [f"Published rows against predictions (written by `{written_by}`).\n"]
    for split, results in found.items():
        held = [r for r in results if (r.fit or "").endswith(f"held out by {split}")]
        parts.append(f"## Held out by {split}\n")
        parts.append(_table(summarise(held), "family"))
        alone = sorted({g.name for g in summarise(results) if g.by == "family" and f"no other {split}" in g.fit})
        if alone:
            parts.append(f"Not held out, since all their rows are of one {split}: {', '.join(alone)}.\n")
        if any((r.fit or "").startswith("engine") for r in held):
            parts.append("Of served rows the engine alone: its kernels may be fitted to kernel rows of that source.\n")
    parts.append("## By operator, held out by series\n")
    parts.append(_table(summarise(r for r in series if r.fit == "held out by series"), "operator"))
    parts.append("## By device and engine, held out by series\n")
    parts.append(_table(summarise(r for r in series if r.fit == "held out by series"), "device"))
    parts.append(_table(summarise(r for r in series if r.fit == "held out by series"), "engine"))
    told = direction(series)
    wrong = f" (wrong: {', '.join(told.wrong)})" if told.wrong else ""
    parts.append(
        f"Whether a sampler beats autoregressive decoding was predicted rightly in {told.right} of {told.comparable} "
        f"comparable rows{wrong}.\n"
    )
    parts.append("## The largest errors, held out by series\n")
    parts.append(_worst([r for r in series if r.fit == "held out by series"]))
    parts.append("## Rows that are not predicted, and why\n")
    reasons = {reason: count for reason, count in statuses(series).items() if reason != PREDICTED}
    parts.append(_markdown(("reason", "rows"), [(reason, str(count)) for reason, count in reasons.items()]))
    return "\n".join(parts)


def _table(groups: Sequence[Group], by: str) -> str:
    def row(g: Group) -> tuple[str, ...]:
        shares = (f"{g.median_absolute_error:.1%}", f"{g.mean_absolute_error:.1%}", f"{g.bias:+.1%}")
        return (g.name, str(g.count), *shares, f"{g.coverage:.0%}", ", ".join(g.below_bound) or "0")

    return _markdown(COLUMNS, [row(g) for g in groups if g.by == by])


def _worst(results: Sequence[Result]) -> str:
    worst = sorted(results, key=lambda r: -abs(r.error))[:_SHOWN_WORST]
    return _markdown(
        ("row", "measured", "predicted", "unit", "error"),
        [(r.id, f"{r.measured:.4g}", f"{r.predicted:.4g}", r.unit, f"{r.error:+.0%}") for r in worst],
    )


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    raise SystemExit(fail_in_one_line(main))
