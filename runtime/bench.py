"""Timing of forwards and of whole generations, as `Measurement` records with their raw samples.

A machine's speed drifts, so two things are compared by alternating them (`interleave`) and by the ratios of the
rounds (`paired_ratio`), never by two runs one after the other.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hardware.files import UserError, known
from hardware.fingerprint import fingerprint, git_commit
from runtime.batching import PREFILL_TOKENS
from runtime.cache import Cache
from runtime.checkpoint import model_hash
from runtime.config import DTYPE_BYTES, DecodingConfig, DType, KernelConfig, Workload, require
from runtime.conversion.tasks import FAMILIES, draw
from runtime.engine import GenerationResult, generate
from runtime.layout import causal, draft
from runtime.measurement import ForwardKind, Kind, Measurement
from runtime.model.zaya import Zaya
from runtime.policy import using
from runtime.tokenizer import BOS, EOS, VOCABULARY

T = TypeVar("T")
FORWARD_KINDS: tuple[ForwardKind, ...] = ("decode", "draft", "verify")


@dataclass(frozen=True)
class Identity:
    """What a record says about its origin, found once per run: hashing and fingerprinting are not for inner loops."""

    model: str
    model_hash: str
    command: str
    device: dict[str, Any]
    commit: str
    simulated: str | None = None


def identify(model: Zaya, name: str, command: str, *, simulated: str | None = None) -> Identity:
    """The identity of this model on this machine. simulated: what is not real, for example "random weights"."""
    weight = model.model.embed_tokens.weight
    gpu = torch.cuda.get_device_name(weight.device) if weight.is_cuda else None
    found = fingerprint(gpu)
    if not weight.is_cuda:
        found["device"] = found["cpu"]  # the machine may have a GPU that this model does not use
    return Identity(name, model_hash(model), command, found, git_commit(Path(__file__)), simulated)


@dataclass(frozen=True)
class Prefilled:
    """A cache that holds `context` tokens of every sequence, and the tokens that follow them, int64 [B, slots]."""

    cache: Cache
    following: Tensor


def token_rows(model: Zaya, batch: int, length: int, *, seed: int = 0) -> list[list[int]]:
    """Rows of `length` tokens: held-out tasks for the byte vocabulary of zaya-nano, random ids for any other."""
    rng = random.Random(f"rows/{seed}")
    if model.config.vocab_size != VOCABULARY:
        return [[rng.randrange(model.config.vocab_size) for _ in range(length)] for _ in range(batch)]
    rows = []
    for _ in range(batch):
        row: list[int] = []
        while len(row) < length:
            problem = draw(rng.choice(sorted(FAMILIES)), rng, "test")
            row += [BOS, *(problem.prompt + problem.solution).encode(), EOS]
        rows.append(row[:length])
    return rows


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


@torch.inference_mode()
def prefill(
    model: Zaya, batch: int, context: int, slots: int, *, tokens: Sequence[Sequence[int]] | None = None
) -> Prefilled:
    """Fill a cache with `context` tokens per sequence, ready for forwards of up to `slots` slots.

    tokens: rows of at least context + slots ids, used in turn; default `token_rows`. UserError beyond the model's
    context.
    """
    require(batch >= 1, f"batch >= 1 must hold, but got {batch}")
    require(slots >= 1, f"slots >= 1 must hold, but got {slots}")
    require(context >= 0, f"context >= 0 must hold, but got {context}")
    needed, room = context + slots, model.config.max_position_embeddings
    require(
        needed <= room, f"context + slots must fit the model's {room} positions, but got {context} + {slots} = {needed}"
    )
    rows = list(tokens) if tokens is not None else token_rows(model, batch, needed)
    for i, row in enumerate(rows):
        require(len(row) >= needed, f"a row must have context + slots = {needed} tokens, but row {i} has {len(row)}")
    device = model.model.embed_tokens.weight.device
    ids = torch.tensor([list(rows[b % len(rows)][:needed]) for b in range(batch)], device=device)
    cache = model.new_cache(batch, needed, slots)
    for begin in range(0, context, PREFILL_TOKENS):
        part = ids[:, begin : min(begin + PREFILL_TOKENS, context)]
        model.forward(part, causal(part.shape[1], str(device)), cache)
        cache.advance([part.shape[1]] * batch)
    return Prefilled(cache, ids[:, context:])


@torch.inference_mode()
def measure_forward(
    model: Zaya,
    identity: Identity,
    *,
    kind: ForwardKind,
    batch: int,
    slots: int,
    context: int,
    kernels: KernelConfig | None = None,
    repeats: int = 10,
    warmup: int = 2,
    prefilled: Prefilled | None = None,
) -> Measurement:
    """Time one forward of batch x slots tokens over `context` cached ones, with the LM head's rows that its kind needs.

    decode: 1 slot, 1 head row; draft: [anchor, slots - 1 masks], slots - 1 head rows; verify: causal, all rows.
    The cache is not advanced, so every repeat does the same work. prefilled: a cache of this batch and context to
    reuse. Sampling and the engine's counting are not in the time.
    """
    if kind not in FORWARD_KINDS:
        raise known("kind of forward", kind, FORWARD_KINDS)
    require(kind != "decode" or slots == 1, f"a decode forward has 1 slot per sequence, but got {slots}")
    require(kind != "draft" or slots >= 2, f"a draft forward has at least 2 slots (anchor, mask), but got {slots}")
    require(repeats >= 1, f"repeats >= 1 must hold, but got {repeats}")
    if prefilled is None:
        prefilled = prefill(model, batch, context, slots)
    cache, tokens = prefilled.cache, prefilled.following[:, :slots]
    require(
        cache.lengths == [context] * batch and tokens.shape == (batch, slots),
        f"the prefilled cache must hold {batch} x {context} tokens and {slots} that follow, but holds "
        f"{cache.lengths} and {prefilled.following.shape[1]}",
    )
    device, layout, first = tokens.device, causal(slots, str(tokens.device)), 0
    if kind == "draft":
        mask = model.config.mask_token_id
        require(mask is not None, "a draft needs masks, but this model's config has no mask_token_id")
        tokens = torch.cat([tokens[:, :1], torch.full_like(tokens[:, 1:], mask or 0)], dim=1)
        layout, first = draft(slots - 1, str(device)), 1

    def run(routes: list[Tensor] | None = None) -> None:
        model.project(model.forward(tokens, layout, cache, routes=routes)[:, first:])

    with using(model, kernels) as used:
        routes: list[Tensor] = []
        run(routes)
        seconds = sample_seconds(run, device, repeats, warmup)
    experts = [len(set(r.tolist()) - {model.config.num_experts}) for r in routes]
    decoding = DecodingConfig() if kind == "decode" else DecodingConfig("two_forward", draft_tokens=max(1, slots - 1))
    return _record(
        "forward",
        identity,
        model,
        Workload(batch, max(1, context), slots, _dtype(model)),
        decoding,
        used,
        slots=slots,
        context=context,
        seconds=seconds,
        forwards=1,
        experts_per_layer=statistics.fmean(experts),
        forward=kind,
    )


def sample_seconds(run: Callable[[], Any], device: torch.device, repeats: int, warmup: int) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` unrecorded ones; a GPU is waited for around each call."""
    samples = []
    for index in range(warmup + repeats):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        if index >= warmup:
            samples.append(time.perf_counter() - began)
    return samples


@dataclass(frozen=True)
class GenerationSample:
    """One generation: its decoding seconds (without the prefill) and what it counted."""

    seconds: float
    tokens: int
    forwards: int
    histogram: tuple[int, ...]  # entry n: steps of a sequence that committed n drafts and one token more
    experts_per_layer: float  # distinct experts in a mean verify (or decode) forward, mean over layers
    outputs: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second of decoding."""
        return self.tokens / self.seconds


def sample_generation(
    model: Zaya,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    *,
    kernels: KernelConfig | None = None,
    batch: int | None = None,
    max_new_tokens: int,
    seed: int = 0,
) -> GenerationSample:
    """Generate once and time it. batch: decode the prompts in closed batches of so many, one after the other."""
    size = batch or len(prompts)
    require(size >= 1, f"batch >= 1 must hold, but got {size}")
    device = model.model.embed_tokens.weight.device
    results: list[GenerationResult] = []
    with using(model, kernels):
        for begin in range(0, len(prompts), size):
            _wait(device)
            part = prompts[begin : begin + size]
            results.append(generate(model, part, decoding, max_new_tokens=max_new_tokens, seed=seed + begin))
    # The engine reads every step's tokens on the host, so its clock has waited for the device.
    widest = [r.counters["verify" if "verify" in r.counters else "decode"] for r in results]
    experts = sum(sum(c.experts_per_layer()) * c.forwards for c in widest) / sum(c.forwards for c in widest)
    histogram = _sum([r.acceptance_histogram for r in results])
    return GenerationSample(
        sum(r.decode_seconds for r in results),
        sum(len(tokens) for r in results for tokens in r.tokens),
        sum(r.forwards for r in results),
        histogram if decoding.sampler != "autoregressive" else (),
        experts / model.config.num_hidden_layers,
        tuple(tuple(tokens) for r in results for tokens in r.tokens),
    )


def measure_generation(
    model: Zaya,
    identity: Identity,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    *,
    kernels: KernelConfig | None = None,
    batch: int | None = None,
    max_new_tokens: int,
    repeats: int = 3,
    warmup: int = 1,
    seed: int = 0,
) -> Measurement:
    """Generate `repeats` times with different seeds after `warmup` unrecorded runs, as `sample_generation`."""
    require(repeats >= 1, f"repeats >= 1 must hold, but got {repeats}")
    settings: dict[str, Any] = {"kernels": kernels, "batch": batch, "max_new_tokens": max_new_tokens}
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
    max_new_tokens: int,
    quality: Mapping[str, float] | None = None,
) -> Measurement:
    """Samples of one operating point as a record. Forwards and histogram are sums over the samples.

    `context` is the mean number of cached tokens during decoding: the prompt and half of what was generated.
    """
    require(len(samples) >= 1, "a record must have at least one sample")
    prompt_tokens = statistics.fmean(map(len, prompts))
    generated = statistics.fmean(s.tokens for s in samples) / len(prompts)
    with using(model, kernels) as used:
        return _record(
            "generation",
            identity,
            model,
            Workload(batch or len(prompts), max(1, round(prompt_tokens)), max_new_tokens, _dtype(model)),
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
        )


def interleave(
    runs: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    warmup: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[T]]:
    """Call the runs in turn (A, B, A, B, ...), so that a slow minute of the machine hits all of them.

    Every second round goes backwards, so that none always runs first. Entry i of all lists is of the same round.
    progress: called with the number of finished calls.
    """
    require(rounds >= 1, f"rounds >= 1 must hold, but got {rounds}")
    results: dict[str, list[T]] = {name: [] for name in runs}
    done = 0
    for index in range(-warmup, rounds):
        names = list(runs) if index % 2 == 0 else list(runs)[::-1]
        for name in names:
            result = runs[name]()
            if index >= 0:
                results[name].append(result)
            done += 1
            if progress:
                progress(done)
    return results


def paired_ratio(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of the rounds' ratios a / b, and the interval of that median by order statistics.

    The median lies between the k-th smallest and k-th largest of n ratios with probability
    1 - 2 * sum(C(n, i), i < k) / 2^n whatever their distribution; k is the largest that keeps the confidence. With
    fewer than `measurement.INTERVAL_ROUNDS` even the whole range covers less than 95%: low and high are that range.
    """
    if len(a) != len(b) or not a:
        raise UserError(f"pairs must be complete and at least one, but got {len(a)} and {len(b)}")
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    n, k = len(ratios), 1
    while 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n >= confidence:
        k += 1
    return statistics.median(ratios), ratios[k - 1], ratios[n - k]


def _sum(histograms: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(counts) for counts in zip_longest(*histograms, fillvalue=0))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _dtype(model: Zaya) -> DType:
    name = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise known("dtype", name, DTYPE_BYTES)
    return name  # type: ignore[return-value]


def _record(
    kind: Kind,
    identity: Identity,
    model: Zaya,
    workload: Workload,
    decoding: DecodingConfig,
    kernels: KernelConfig,
    *,
    slots: int,
    context: int,
    seconds: Sequence[float],
    **counted: Any,
) -> Measurement:
    return Measurement(
        kind=kind,
        model=identity.model,
        model_hash=identity.model_hash,
        device=identity.device,
        command=identity.command,
        commit=identity.commit,
        date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        workload=workload,
        decoding=decoding,
        kernels=kernels,
        slots=slots,
        context=context,
        seconds=tuple(seconds),
        simulated=identity.simulated,
        **counted,
    )
