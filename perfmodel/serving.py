"""A served model in steady state: requests in flight, each replaced when it ends, whose prompts share the steps.

What a user waits for between two tokens is one step: the decoding of all active sequences and, where a request has
just arrived, a chunk of its prompt, which shares the step's weights (chunked prefill; Agrawal et al. 2024,
arXiv 2403.02310). Two figures are easily confused:

* mean TPOT, the time of a request after its first token over its other tokens, has every step, prompts included;
* median ITL, the median gap between two tokens, has no prompt unless most steps carry one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from perfmodel.decoding import ForwardTiming, Setting, time_forward, time_prefill, time_step
from perfmodel.memory import memory_bytes, usable_bytes, weight_bytes
from perfmodel.model_spec import require_context
from perfmodel.operators import Array
from perfmodel.roofline import Timing, total
from perfmodel.sizes import LARGEST
from perfmodel.steps import step_of
from runtime.config import DecodingConfig, require

Metric = Literal["mean_tpot", "median_itl", "mean_step"]

CHUNK_TOKENS = 8192  # of prompts in one step: the default of vLLM and SGLang on these devices, and of TensorRT-LLM
MOST_VARIATION = 10.0


@dataclass(frozen=True)
class Load:
    """What a server is kept busy with; numbers or arrays that broadcast.

    sequences: requests in flight. prompt, generated: mean tokens of a request. variation: the coefficient of variation
    of the generated tokens (0: all alike); long requests are in flight for longer, so that it lengthens what is seen.
    drawn: tokens are drawn, for which engines sort the logits (top-k, top-p); else the likeliest is taken.
    admitted: all sequences are known to be active at once; else only as many as the memory holds at their full length.
    """

    sequences: npt.ArrayLike
    prompt: npt.ArrayLike
    generated: npt.ArrayLike
    variation: float = 0.0
    drawn: bool = False
    admitted: bool = False

    def __post_init__(self) -> None:
        for name in ("sequences", "prompt", "generated"):
            for value in map(float, (np.min(getattr(self, name)), np.max(getattr(self, name)))):
                require(1 <= value <= LARGEST, f"1 <= {name} <= {LARGEST:g} must hold, but got {value:g}")
        most = MOST_VARIATION
        require(0 <= self.variation <= most, f"0 <= variation <= {most:g} must hold, but got {self.variation:g}")

    @property
    def context(self) -> Array:
        """Cached tokens of an active sequence, in the mean over time: E[n^2] / 2 E[n] of the generated ones."""
        grown = np.asarray(self.generated, dtype=float) * (1 + self.variation**2) / 2
        return np.asarray(self.prompt, dtype=float) + grown


@dataclass(frozen=True)
class Served:
    """A server in steady state, in arrays that broadcast.

    active: sequences that are decoded at once; fewer than in flight where the memory holds no more of them.
    decode_seconds: a step that carries no prompt. prompt_seconds: what a request's prompt adds to the steps that carry
    it. arrivals: prompts per step.
    """

    active: Array
    arrivals: Array
    decode_seconds: Array
    prompt_seconds: Array
    bound_seconds: Array  # of a step without a prompt, at datasheet peaks
    generated: Array
    median_itl_seconds: Array

    @property
    def mean_step_seconds(self) -> Array:
        """All steps, those with prompts included: the time in which every active sequence gets a token."""
        return self.decode_seconds + self.arrivals * self.prompt_seconds

    @property
    def mean_tpot_seconds(self) -> Array:
        """Of a request after its first token: its steps, with the prompts of all others."""
        return self.decode_seconds + (self.active - 1) / self.generated * self.prompt_seconds

    @property
    def output_tokens_per_second(self) -> Array:
        """Of all sequences together."""
        return self.active / self.mean_step_seconds

    def seconds(self, metric: Metric) -> Array:
        """Mean TPOT, median ITL or the mean step."""
        if metric == "mean_tpot":
            return self.mean_tpot_seconds
        return self.median_itl_seconds if metric == "median_itl" else self.mean_step_seconds


def active_sequences(at: Setting, load: Load) -> Array:
    """Requests that are decoded at once. UserError where the memory holds not one, or not all that are said to be."""
    length = np.asarray(load.prompt, dtype=float) + np.asarray(load.generated, dtype=float)
    weights, hardware = weight_bytes(at), at.device.hardware
    each = memory_bytes(at, 1, length) - weights  # of one sequence, on each device of its replica
    most = (usable_bytes(hardware) - weights) / each * at.parallel.replicas
    require(
        float(np.min(most)) >= 1,
        f"weights and one request must fit the {usable_bytes(hardware) / 1e9:.1f} GB of {hardware.name} that may be "
        f"used, but {at.spec.name} has {weights / 1e9:.1f} GB of weights a device and "
        f"{float(np.max(each)) / 1e9:.1f} GB of cache a request",
    )
    sequences = np.asarray(load.sequences, dtype=float)
    if not load.admitted:
        return np.minimum(sequences, most)
    capacity, needed = hardware.usable_memory_bytes, float(np.max(memory_bytes(at, sequences, load.context)))
    require(
        needed <= capacity,
        f"all sequences must fit the {capacity / 1e9:.1f} GB of {hardware.name}, but {float(np.max(sequences)):g} at a "
        f"mean context of {float(np.max(load.context)):g} need {needed / 1e9:.1f} GB",
    )
    return sequences


def serve(at: Setting, load: Load) -> Served:
    """The steady state of a load on a model, device and engine.

    UserError for requests longer than the model's context, and where the memory does not hold one.
    """
    prompt, generated = np.asarray(load.prompt, dtype=float), np.asarray(load.generated, dtype=float)
    require_context(at.spec, math.ceil(float(np.max(prompt + generated))))
    active = active_sequences(at, load)
    decoding = DecodingConfig(temperature=1.0 if load.drawn else 0.0)
    step = time_step(at, step_of(decoding), active, load.context)
    decode, beside = step.forwards[0], step.beside.seconds
    arrivals = active / generated
    chunks = np.maximum(prompt / CHUNK_TOKENS, 1.0)
    carried = _with_prompts(at, decode, active, load.context, prompt, 1 / chunks)
    usual = np.maximum(arrivals - np.log(2), 0.0)  # prompts of the median step: arrivals are Poisson, and P(0) = 1/2
    median = _with_prompts(at, decode, active, load.context, prompt, usual)
    return Served(
        active=active,
        arrivals=arrivals,
        decode_seconds=step.seconds,
        prompt_seconds=chunks * np.maximum(carried - decode.seconds, 0.0),
        bound_seconds=step.bound_seconds,
        generated=generated,
        median_itl_seconds=np.maximum(median, decode.seconds) + beside,
    )


def _with_prompts(
    at: Setting, decode: ForwardTiming, active: Array, context: Array, prompt: Array, prompts: npt.ArrayLike
) -> Array:
    """Seconds of a forward that decodes `active` sequences and reads `prompts` prompts (a share: so much of one).

    Linear layers and experts see all tokens at once. Attention of the prompts is that of a prefill.
    """
    count = np.asarray(prompts, dtype=float)
    tokens = count * prompt
    rows = active + tokens
    together = time_forward(at, rows, 1, context, (active + count) / rows)
    # A chunk sees, in the mean, half of its prompt before it: as many pairs as the whole prompt's share of them.
    alone = time_prefill(at, np.where(count > 0, count, 1.0), prompt)
    reading = total([op.seconds for op in _attention(alone)])
    attention = total([op.seconds for op in _attention(decode)]) + np.where(count > 0, reading, 0.0)
    others = total([op.seconds for op in together.operators if op.name != "attention"])
    return others + attention


def _attention(forward: ForwardTiming) -> list[Timing]:
    return [op for op in forward.operators if op.name == "attention"]
