"""Timing of whole generations, in closed batches or with continuous batching, as `Measurement` records."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from runtime.bench import Identity, dtype_of, record, token_rows, wait
from runtime.config import DecodingConfig, KernelConfig, Workload, require
from runtime.conversion.tasks import FAMILIES, draw
from runtime.engine import GenerationResult, generate
from runtime.measurement import Batching, Measurement
from runtime.model.zaya import Zaya
from runtime.policy import using
from runtime.tokenizer import BOS, VOCABULARY


def task_prompts(model: Zaya, count: int, *, seed: int = 0) -> list[list[int]]:
    """Prompts to generate from: held-out problems, the families in turn; 32 random ids for another vocabulary."""
    if model.config.vocab_size != VOCABULARY:
        return token_rows(model, count, 32, seed=seed)
    rng, families = random.Random(f"prompts/{seed}"), list(FAMILIES)
    return [[BOS, *draw(families[i % len(families)], rng, "test").prompt.encode()] for i in range(count)]


def fair_count(least: int, batch: int) -> int:
    """The smallest number of prompts, at least `least`, with full batches and equal shares of task families."""
    require(batch >= 1, f"batch >= 1 must hold, but got {batch}")
    require(least >= 1, f"prompts >= 1 must hold, but got {least}")
    together = math.lcm(batch, len(FAMILIES))
    return math.ceil(least / together) * together


@dataclass(frozen=True)
class GenerationSample:
    """One generation: its decoding seconds (without the prefill) and what it counted."""

    seconds: float
    tokens: int
    forwards: int
    histogram: tuple[int, ...]  # entry n: steps of a sequence that committed n drafts and one token more
    experts_per_layer: float  # distinct experts in a mean forward of the widest kind, mean over layers
    outputs: tuple[tuple[int, ...], ...]
    full_tokens: int = 0  # committed in steps with a sequence in every slot
    full_seconds: float = 0.0  # of those steps
    prefill_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second of decoding, the drain included."""
        return self.tokens / self.seconds

    @property
    def full_tokens_per_second(self) -> float | None:
        """The same over the steps with a sequence in every slot; None when there were none."""
        return self.full_tokens / self.full_seconds if self.full_seconds else None


def sample_generation(
    model: Zaya,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    *,
    kernels: KernelConfig | None = None,
    batch: int | None = None,
    batching: Batching = "closed",
    max_new_tokens: int | Sequence[int],
    seed: int = 0,
) -> GenerationSample:
    """Generate once and time it.

    batch: slots, by default one per prompt. Closed batching decodes the prompts in batches of so many, one after the
    other; continuous batching refills a finished sequence's slot with the next prompt. max_new_tokens: one limit, or
    one per prompt.
    """
    size = len(prompts) if batch is None else batch
    require(size >= 1, f"batch >= 1 must hold, but got {size}")
    device = model.model.embed_tokens.weight.device
    part = size if batching == "closed" else len(prompts)
    results: list[GenerationResult] = []
    with using(model, kernels):
        for begin in range(0, len(prompts), part):
            wait(device)
            chosen = prompts[begin : begin + part]
            limit = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[begin : begin + part]
            results.append(generate(model, chosen, decoding, max_new_tokens=limit, seed=seed + begin, batch=size))
    # The engine reads every step's tokens on the host, so its clock has waited for the device.
    widest = [r.counters[_widest(r)] for r in results]
    experts = sum(sum(c.experts_per_layer()) * c.forwards for c in widest) / sum(c.forwards for c in widest)
    histogram = _sum([r.acceptance_histogram for r in results])
    return GenerationSample(
        sum(r.decode_seconds for r in results),
        sum(len(tokens) for r in results for tokens in r.tokens),
        sum(r.forwards for r in results),
        histogram if decoding.sampler != "autoregressive" else (),
        experts / model.config.num_hidden_layers,
        tuple(tuple(tokens) for r in results for tokens in r.tokens),
        sum(r.full_tokens for r in results),
        sum(r.full_seconds for r in results),
        sum(r.prefill_seconds for r in results),
    )


def measure_generation(
    model: Zaya,
    identity: Identity,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    *,
    kernels: KernelConfig | None = None,
    batch: int | None = None,
    batching: Batching = "closed",
    max_new_tokens: int,
    repeats: int = 3,
    warmup: int = 1,
    seed: int = 0,
) -> Measurement:
    """Generate `repeats` times with different seeds after `warmup` unrecorded runs, as `sample_generation`."""
    require(repeats >= 1, f"repeats >= 1 must hold, but got {repeats}")
    settings: dict[str, Any] = {"kernels": kernels, "batch": batch, "batching": batching}
    settings["max_new_tokens"] = max_new_tokens
    for _ in range(warmup):
        sample_generation(model, prompts, decoding, **settings, seed=seed)
    seeds = [seed + i * len(prompts) for i in range(repeats)]
    samples = [sample_generation(model, prompts, decoding, **settings, seed=s) for s in seeds]
    return generation_record(model, identity, prompts, decoding, samples, **settings)


def generation_record(
    model: Zaya,
    identity: Identity,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    samples: Sequence[GenerationSample],
    *,
    kernels: KernelConfig | None = None,
    batch: int | None = None,
    batching: Batching = "closed",
    max_new_tokens: int,
    quality: Mapping[str, float] | None = None,
) -> Measurement:
    """Samples of one operating point as a record. Forwards and histogram are sums over the samples.

    `context` is the mean number of cached tokens during decoding: the prompt and half of what was generated.
    """
    require(len(samples) >= 1, "a record must have at least one sample")
    prompt_tokens = statistics.fmean(map(len, prompts))
    generated = statistics.fmean(s.tokens for s in samples) / len(prompts)
    full = [rate for s in samples if (rate := s.full_tokens_per_second) is not None]
    with using(model, kernels) as used:
        return record(
            "generation",
            identity,
            model,
            Workload(batch or len(prompts), max(1, round(prompt_tokens)), max_new_tokens, dtype_of(model)),
            decoding,
            used,
            slots=decoding.slots,
            context=round(prompt_tokens + generated / 2),
            seconds=[s.seconds for s in samples],
            tokens=tuple(s.tokens for s in samples),
            forwards=sum(s.forwards for s in samples),
            acceptance_histogram=_sum([s.histogram for s in samples]),
            experts_per_layer=statistics.fmean(s.experts_per_layer for s in samples),
            quality=dict(quality or {}),
            batching=batching,
            full_tokens_per_second=statistics.median(full) if full else None,
        )


def _widest(result: GenerationResult) -> str:
    """The kind of forward with the most slots; of a draft and a verification that are equal, the verification."""
    kinds = [kind for kind in ("single", "verify", "draft", "decode") if kind in result.counters]
    return max(kinds, key=lambda kind: result.counters[kind].slots / result.counters[kind].forwards)


def _sum(histograms: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(counts) for counts in zip_longest(*histograms, fillvalue=0))
