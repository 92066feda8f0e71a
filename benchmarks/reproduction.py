"""From the headline of ZAYA1-8B-Diffusion to what remains of it, by device, batch and context.

python -m benchmarks.reproduction [--engine zyphra-vllm] [--out docs/reproduction] [--json]

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
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.svg import Dot, Panel, figure
from hardware.files import UserError, write_atomic
from hardware.profile import list_profiles, load_profile
from perfmodel.breakeven import break_even
from perfmodel.contenders import Contender
from perfmodel.decoding import ForwardTiming, Setting, memory_bytes, setting, time_forward, time_step
from perfmodel.kernels.call import Array
from perfmodel.model_spec import load_spec
from perfmodel.published.evidence import FOLDER, Result, held_out_rows
from perfmodel.published.points import TidarThroughputPoint
from perfmodel.published.rows import read_rows
from perfmodel.steps import step_of
from runtime.config import DecodingConfig

MODEL = "zaya1-8b"
HEADLINES = {"lossless": 4.6, "logit mixing": 7.7}
DEVICES = ("h100-sxm", "mi300x")
SAMPLERS = {
    "two_forward": DecodingConfig("two_forward", 16),
    "single_forward": DecodingConfig("single_forward", 16, proposal_levels=(0, 6, 16)),  # the publisher's three levels
}
BATCH = tuple(2**n for n in range(10))
CONTEXT = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 130_944)  # the last with a block below the model's 131,072
SHOWN = (1024, 4096, 32768, 130_944)
PUBLISHED = FOLDER / "zaya_tidar_measured.csv"


@dataclass(frozen=True)
class Costs:
    """What a step costs in autoregressive steps after each effect: [batch, context], NaN where it does not fit."""

    experts: Array
    kv: Array
    forwards: Array
    arithmetic: Array
    kernels: Array
    engine: Array


STAGES = {
    "experts": "experts read",
    "kv": "KV reads",
    "forwards": "all forwards",
    "arithmetic": "arithmetic",
    "kernels": "kernels",
    "engine": "engine",
}


def step_costs(ideal: Setting, real: Setting, decoding: DecodingConfig, batch: Array, context: Array) -> Costs:
    """The cost of a step after each effect, over arrays of batches and contexts that broadcast."""
    slots = decoding.draft_tokens + 1
    step, single = (time_step(ideal, step_of(d), batch, context) for d in (decoding, decoding.autoregressive))
    one, block = single.forwards, (time_forward(ideal, batch, slots, context, slots, "verify"),)
    engine, engine_single = (time_step(real, step_of(d), batch, context) for d in (decoding, decoding.autoregressive))
    fits = memory_bytes(ideal, batch, context + decoding.slots) <= ideal.device.hardware.main_memory.capacity_bytes
    found = (
        _read(block, kv=False) / _read(one, kv=False),
        _read(block) / _read(one),
        _read(step.forwards) / _read(one),
        step.bound_seconds / single.bound_seconds,
        step.seconds / single.seconds,
        engine.seconds / engine_single.seconds,
    )
    return Costs(*(np.where(fits, cost, np.nan) for cost in found))


def _read(forwards: Iterable[ForwardTiming], kv: bool = True) -> Array:
    """Bytes of weights, and of the cache, that forwards read."""
    costs = [(op.executed.cost, f.times) for f in forwards for op in f.operators]
    return sum((n * (c.weight_bytes + (c.kv_bytes if kv else 0.0)) for c, n in costs), np.zeros(()))


@dataclass(frozen=True)
class Measured:
    """A published row beside the autoregressive one of its run, device and batch."""

    row: str
    hardware: str
    decoding: DecodingConfig
    batch: int
    context: float  # half of the generated tokens: the mean while they are generated; the prompt's are not published
    tokens_per_step: float
    ratio: float  # of throughput over autoregressive
    predicted_ratio: float  # both throughputs by an engine that was fitted without their series, the drain included

    @property
    def step_cost(self) -> float:
        """Autoregressive steps that a step took."""
        return self.tokens_per_step / self.ratio


@cache
def measured_pairs() -> tuple[Measured, ...]:
    """Every published throughput with an acceptance length whose run has an autoregressive row."""
    runs: dict[tuple[Any, ...], dict[str, Result]] = {}
    for result in held_out_rows(read_rows(PUBLISHED), "series"):
        p = result.point
        if isinstance(p, TidarThroughputPoint):
            key = p.prefix, p.hardware.name, p.batch, p.generated_tokens
            runs.setdefault(key, {})[p.decoding.sampler] = result
    found = []
    for members in runs.values():
        base = members.pop("autoregressive", None)
        for result in members.values():
            p = result.point
            if base is None or not isinstance(p, TidarThroughputPoint) or p.acceptance_length is None:
                continue
            measured, predicted = ((a or 0) / (b or 1) for a, b in (
                (result.measured, base.measured), (result.predicted, base.predicted)
            ))  # fmt: skip
            found.append(
                Measured(
                    result.id, p.hardware.name, p.decoding, p.batch, p.generated_tokens / 2, p.acceptance_length,
                    measured, predicted,
                )
            )  # fmt: skip
    return tuple(found)


def settings(device: str, engine: str) -> tuple[Setting, Setting]:
    """ZAYA1-8B on a device without a runtime, and with the engine."""
    spec, hardware = load_spec(MODEL), load_profile(device)
    return tuple(setting(spec, hardware, "bfloat16", engine=name) for name in ("ideal-graph", engine))  # type: ignore[return-value]


def table(engine: str) -> list[dict[str, Any]]:
    """A row for each device, sampler, batch and context and each headline, with what remains after every effect."""
    batch, context = np.array(BATCH, dtype=float)[:, None], np.array(CONTEXT, dtype=float)[None, :]
    rows = []
    for device in DEVICES:
        ideal, real = settings(device, engine)
        for sampler, decoding in SAMPLERS.items():
            costs = asdict(step_costs(ideal, real, decoding, batch, context))
            for claim, tokens in HEADLINES.items():
                for i, j in np.ndindex(len(BATCH), len(CONTEXT)):
                    left = {f"after_{name}": _rounded(tokens / cost[i, j]) for name, cost in costs.items()}
                    rows.append(
                        {"hardware": device, "sampler": sampler, "headline": claim, "batch": BATCH[i],
                         "context": CONTEXT[j], "tokens_per_step": tokens, **left}
                    )  # fmt: skip
    return rows


def beside_measured(engine: str) -> list[dict[str, Any]]:
    """The measured pairs, with the step cost that each stage predicts at the same batch, K, levels and context."""
    rows = []
    for pair in measured_pairs():
        at = np.array(float(pair.batch)), np.array(pair.context)
        costs = asdict(step_costs(*settings(pair.hardware, engine), pair.decoding, *at))
        rows.append(
            {"row": pair.row, "hardware": pair.hardware, "sampler": pair.decoding.sampler, "batch": pair.batch,
             "context": pair.context, "tokens_per_step": pair.tokens_per_step, "ratio": _rounded(pair.ratio),
             "predicted_ratio": _rounded(pair.predicted_ratio), "measured_cost": _rounded(pair.step_cost),
             **{f"cost_{name}": _rounded(float(cost)) for name, cost in costs.items()}}
        )  # fmt: skip
    return rows


def by_device() -> list[dict[str, Any]]:
    """For every GPU that has a profile, without a runtime: in how many cells each headline holds, and the most left."""
    spec, rows = load_spec(MODEL), []
    for name in list_profiles():
        hardware = load_profile(name)
        if hardware.kind != "gpu":
            continue
        at = setting(spec, hardware, "bfloat16", engine="ideal-graph")
        for sampler, decoding in SAMPLERS.items():
            tried = [Contender(decoding, HEADLINES["lossless"])]
            found = break_even(at, tried, BATCH, CONTEXT, headlines=tuple(HEADLINES.values()))
            for claim, headline in zip(HEADLINES, found.headlines, strict=True):
                i, j = np.unravel_index(int(np.nanargmax(headline.remaining)), headline.remaining.shape)
                rows.append(
                    {"hardware": name, "sampler": sampler, "headline": claim,
                     "tokens_per_step": headline.tokens_per_step, "cells": int(found.fits.sum()),
                     "cells_faster_than_autoregressive": int((headline.remaining > 1).sum()),
                     "cells_where_it_holds": int(headline.holds.sum()),
                     "most_remaining": _rounded(float(headline.remaining[i, j])),
                     "batch": found.batch[i], "context": found.context[j]}
                )  # fmt: skip
    return rows


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.4g}")


def drawing(rows: list[dict[str, Any]], pairs: list[dict[str, Any]], engine: str) -> str:
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
                    shown = f"engine {engine}" if key == "engine" else name
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
        "predicted without its series",
    )


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys; an empty field where there is no figure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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
    """Write table, pairs and figure, and print the summary; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="zyphra-vllm", help="the engine of the last stage")
    parser.add_argument("--out", type=Path, help="a folder for table.csv, measured.csv, devices.csv and figure.svg")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    chosen = parser.parse_args(arguments)
    rows, pairs = table(chosen.engine), beside_measured(chosen.engine)
    if chosen.out is not None:
        write_atomic(chosen.out / "table.csv", as_csv(rows))
        write_atomic(chosen.out / "measured.csv", as_csv(pairs))
        write_atomic(chosen.out / "devices.csv", as_csv(by_device()))
        write_atomic(chosen.out / "figure.svg", drawing(rows, pairs, chosen.engine))
    print(json.dumps({"table": rows, "measured": pairs}) if chosen.json else summary(rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
