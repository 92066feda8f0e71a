"""From the headline of ZAYA1-8B-Diffusion to what remains of it, by device, batch and context.

python -m benchmarks.reproduction [--out docs/reproduction] [--json]

The publisher's 4.6x and 7.7x are tokens committed per step. They are speedups if a step costs one autoregressive step.
This takes the cost apart, one effect after the other; what remains is the tokens per step over the cost so far:

* experts read: a forward of K + 1 slots against one of a single slot, by the weight bytes that each reads;
* KV reads: the same with the cached keys and values, which all slots of a sequence share;
* all forwards: draft and verify (two_forward), or one of (K + 1)(1 + P) slots (single_forward), by bytes;
* arithmetic: the roofline of the step, sampler included, at datasheet peaks;
* kernels: the calibrated estimate of replayed graphs without a runtime (ideal-graph);
* engine: the estimate of the publisher's engine.

Measured are the publisher's own pairs of rows: the throughput over the autoregressive one of the same run, device
and batch. The row's acceptance length over that ratio is its step cost, so that rows of different acceptance compare.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.headline import DEVICES, ENGINE, HEADLINES, SAMPLERS, SHOWN, STAGES, beside_measured, by_device, table
from benchmarks.svg import Dot, Panel, figure
from hardware.files import UserError, write_atomic


def drawing(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> str:
    """The lossless headline: a row of panels for each sampler and device, a column for each context shown."""
    tokens, claim = HEADLINES["lossless"], "lossless"
    panels = []
    for sampler in SAMPLERS:
        for device in DEVICES:
            line = []
            for context in SHOWN:
                cells = [
                    r for r in rows
                    if (r["hardware"], r["sampler"], r["headline"], r["context"]) == (device, sampler, claim, context)
                ]  # fmt: skip
                lines = {"headline": [(float(r["batch"]), tokens) for r in cells]}
                for key, name in STAGES.items():
                    shown = f"engine {ENGINE}" if key == "engine" else name
                    lines[shown] = [(float(r["batch"]), r[f"after_{key}"]) for r in cells]
                dots = [
                    Dot(float(p["batch"]), tokens * p[ratio] / p["tokens_per_step"], f"{p['row']}: {p[ratio]}x", full)
                    for p in pairs
                    for ratio, full in (("predicted_ratio", False), ("ratio", True))
                    if (p["hardware"], p["sampler"]) == (device, sampler)
                    and context == min(SHOWN, key=lambda c, at=p["context"]: abs(np.log(c / at)))  # type: ignore[misc]
                ]
                line.append(Panel(f"{sampler}, {device}, context {context}", lines, dots))
            panels.append(line)
    return figure(
        panels,
        f"What remains of {tokens:g}x at {tokens:g} tokens a step, as each effect is counted (7.7x: all times 1.67)",
        "batch (sequences)",
        "speedup over autoregressive decoding",
        "measured",
        "predicted",
    )


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys; an empty field where there is no figure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def in_words(rows: list[dict[str, Any]], pairs: list[dict[str, Any]], devices: list[dict[str, Any]]) -> str:
    """The figures of the page as Markdown: a few cells of the table, what is left at most, and the measured pairs."""
    errors = [abs(p["predicted_ratio"] / p["ratio"] - 1) for p in pairs]
    right = sum((p["predicted_ratio"] > 1) == (p["ratio"] > 1) for p in pairs)
    most = max((d for d in devices if d["headline"] == "lossless"), key=lambda d: d["most_remaining"])
    held = sum(d["cells_where_it_holds"] for d in devices)
    lines = [
        "What remains of 4.6x, effect by effect (written by `python -m benchmarks.reproduction`):",
        "",
        summary(rows),
        f"Without a runtime, a headline holds in {held} of {sum(d['cells'] for d in devices)} cells of all GPUs, "
        f"samplers and headlines. The most that is left of 4.6x is {most['most_remaining']:.1f}x: {most['sampler']} on "
        f"{most['hardware']} at batch {most['batch']}, context {most['context']:,}.",
        "",
        f"Measured and predicted ratios of throughput over autoregressive decoding, {len(pairs)} pairs of published "
        f"rows; each throughput is predicted by an engine fitted without its own series. Mean error "
        f"{np.mean(errors):.0%}, median {np.median(errors):.0%}; whether the sampler is faster is said rightly in "
        f"{right}.",
        "",
        "| row | batch | tokens a step | measured | predicted | measured cost of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {p['row']} | {p['batch']} | {p['tokens_per_step']:.2f} | {p['ratio']:.2f}x "
            f"| {p['predicted_ratio']:.2f}x | {p['measured_cost']:.1f} |"
            for p in pairs
        ),
    ]
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Any]]) -> str:
    """The lossless headline at a few cells, as Markdown."""
    lines = [
        "| device | sampler | batch | context | headline | " + " | ".join(STAGES.values()) + " |",
        "| --- | --- | ---: | ---: |" + " ---: |" * (1 + len(STAGES)),
    ]
    for r in rows:
        if r["headline"] == "lossless" and r["batch"] in (1, 8, 64, 512) and r["context"] in (1024, 32768):
            left = ["-" if r[f"after_{name}"] is None else f"{r[f'after_{name}']:.2f}" for name in STAGES]
            cells = [r["hardware"], r["sampler"], r["batch"], r["context"], r["tokens_per_step"], *left]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the tables and the figure, and print the page's figures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for the tables (.csv), figures.md and figure.svg")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    chosen = parser.parse_args(arguments)
    rows, pairs, devices = table(), beside_measured(), by_device()
    if chosen.out is not None:
        write_atomic(chosen.out / "table.csv", as_csv(rows))
        write_atomic(chosen.out / "measured.csv", as_csv(pairs))
        write_atomic(chosen.out / "devices.csv", as_csv(devices))
        write_atomic(chosen.out / "figures.md", in_words(rows, pairs, devices))
        write_atomic(chosen.out / "figure.svg", drawing(rows, pairs))
    document = {"table": rows, "measured": pairs, "devices": devices}
    print(json.dumps(document) if chosen.json else in_words(rows, pairs, devices), end="\n" if chosen.json else "")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
