"""The headline of ZAYA1-8B-Diffusion taken apart: what a step costs as each effect is counted, and as measured.

See `benchmarks.reproduction`, which writes it down.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from hardware.profile import list_profiles, load_profile
from perfmodel.breakeven import break_even
from perfmodel.contenders import Contender
from perfmodel.decoding import ForwardTiming, Setting, setting, time_forward, time_step
from perfmodel.kernels.call import Array
from perfmodel.memory import memory_bytes, usable_bytes
from perfmodel.model_spec import load_spec
from perfmodel.published.evidence import FOLDER, compared, held_out_rows
from perfmodel.published.points import TidarThroughputPoint
from perfmodel.published.rows import read_rows
from perfmodel.steps import step_of
from runtime.config import DecodingConfig

MODEL = "zaya1-8b"
ENGINE = "zyphra-vllm"
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
    fits = memory_bytes(ideal, batch, context + decoding.slots) <= usable_bytes(ideal.device.hardware)
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
    predicted_ratio: float  # each by an engine fitted without its own series, the drain included

    @property
    def step_cost(self) -> float:
        """Autoregressive steps that a step took."""
        return self.tokens_per_step / self.ratio


@cache
def measured_pairs() -> tuple[Measured, ...]:
    """Every published throughput with an acceptance length whose run has an autoregressive row."""
    found = []
    for result, base in compared(held_out_rows(read_rows(PUBLISHED), "series")):
        p = result.point
        if not isinstance(p, TidarThroughputPoint) or p.acceptance_length is None:
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


def settings(device: str) -> tuple[Setting, Setting]:
    """ZAYA1-8B on a device without a runtime, and with the publisher's engine."""
    spec, hardware = load_spec(MODEL), load_profile(device)
    return tuple(setting(spec, hardware, "bfloat16", engine=name) for name in ("ideal-graph", ENGINE))  # type: ignore[return-value]


def table() -> list[dict[str, Any]]:
    """A row for each device, sampler, batch and context and each headline, with what remains after every effect."""
    batch, context = np.array(BATCH, dtype=float)[:, None], np.array(CONTEXT, dtype=float)[None, :]
    rows = []
    for device in DEVICES:
        ideal, real = settings(device)
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


def beside_measured() -> list[dict[str, Any]]:
    """The measured pairs, with the step cost that each stage predicts at the same batch, K, levels and context."""
    rows = []
    for pair in measured_pairs():
        at = np.array(float(pair.batch)), np.array(pair.context)
        costs = asdict(step_costs(*settings(pair.hardware), pair.decoding, *at))
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
