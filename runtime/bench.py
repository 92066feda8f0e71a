"""Timing of forwards, and what every timing needs: `Measurement` records with their origin, and fair comparisons.

A machine's speed drifts, so two things are compared by alternating them (`interleave`) and by the ratios of the
rounds (`paired_ratio`), never by two runs one after the other.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from hardware.files import known
from hardware.fingerprint import git_commit
from runtime.batching import PREFILL_TOKENS
from runtime.cache import Cache
from runtime.checkpoint import model_hash
from runtime.config import DTYPE_BYTES, DecodingConfig, DType, KernelConfig, Workload, require
from runtime.conversion.tasks import FAMILIES, draw
from runtime.engines import bound
from runtime.graphs import captured
from runtime.layout import Layout, causal, draft, single_forward
from runtime.measurement import ForwardKind, Kind, Measurement
from runtime.model.zaya import Zaya
from runtime.policy import device_of, using
from runtime.statistics import paired_ratio as paired_ratio  # here for those who interleave
from runtime.tokenizer import BOS, EOS, VOCABULARY

T = TypeVar("T")
FORWARD_KINDS: tuple[ForwardKind, ...] = get_args(ForwardKind)


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
    return Identity(name, model_hash(model), command, device_of(model), git_commit(Path(__file__)), simulated)


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
    levels: tuple[int, ...] = (0,),
    kernels: KernelConfig | None = None,
    repeats: int = 10,
    warmup: int = 2,
    prefilled: Prefilled | None = None,
) -> Measurement:
    """Time one forward of batch x slots tokens over `context` cached ones, with the LM head's rows that its kind needs.

    decode: 1 slot, 1 head row; draft: [anchor, slots - 1 masks], slots - 1 head rows; verify: causal, all rows;
    single: K + 1 verified slots and a block of K + 1 masks per level, 2 K + 1 head rows.
    The cache is not advanced, so every repeat does the same work. prefilled: a cache of this batch and context to
    reuse. Sampling and the engine's counting are not in the time; the engine `graphs` replays the forward as one.
    """
    require(repeats >= 1, f"repeats >= 1 must hold, but got {repeats}")
    point = point_of(model, kind=kind, batch=batch, slots=slots, context=context, levels=levels, prefilled=prefilled)

    def run(routes: list[Tensor] | None = None) -> None:
        hidden = model.forward(point.tokens, point.layout, point.cache, routes=routes)
        # Captured steps keep logits in the model's type, which their sampling kernels read.
        graphs = model.kernels.engine == "graphs"
        (bound(model, point.cache).forward.project if graphs else model.project)(hidden[:, point.rows])

    device = point.tokens.device
    with using(model, kernels) as used:
        routes: list[Tensor] = []
        run(routes)
        timed = captured(run, device) if used.engine == "graphs" else run
        seconds = sample_seconds(timed, device, repeats, warmup)
    experts = [len(set(r.tolist()) - {model.config.num_experts}) for r in routes]
    return record(
        "forward",
        identity,
        model,
        Workload(batch, max(1, context), slots, dtype_of(model)),
        point.decoding,
        used,
        slots=slots,
        context=context,
        seconds=seconds,
        forwards=1,
        experts_per_layer=statistics.fmean(experts),
        forward=kind,
    )


@dataclass(frozen=True)
class Point:
    """One forward to time: what it is given, which of its rows reach the LM head, and settings with such a forward."""

    cache: Cache
    tokens: Tensor  # int64 [B, slots]
    layout: Layout
    rows: slice
    decoding: DecodingConfig


def point_of(
    model: Zaya,
    *,
    kind: ForwardKind,
    batch: int,
    slots: int,
    context: int,
    levels: tuple[int, ...] = (0,),
    prefilled: Prefilled | None = None,
) -> Point:
    """The forward of this kind over `context` cached tokens per sequence; see `measure_forward` for the kinds.

    prefilled: a cache of this batch and context to reuse.
    """
    if kind not in FORWARD_KINDS:
        raise known("kind of forward", kind, FORWARD_KINDS)
    require(kind != "decode" or slots == 1, f"a decode forward has 1 slot per sequence, but got {slots}")
    require(kind != "draft" or slots >= 2, f"a draft forward has at least 2 slots (anchor, mask), but got {slots}")
    decoding = _decoding_of(kind, slots, levels)
    if prefilled is None:
        prefilled = prefill(model, batch, context, slots)
    cache, tokens = prefilled.cache, prefilled.following[:, :slots]
    require(
        cache.lengths == [context] * batch and tokens.shape == (batch, slots),
        f"the prefilled cache must hold {batch} x {context} tokens and {slots} that follow, but holds "
        f"{cache.lengths} and {prefilled.following.shape[1]}",
    )
    device, layout = tokens.device, causal(slots, str(tokens.device))
    rows = slice(None)
    causal_slots = {"draft": 1, "single": decoding.draft_tokens + 1}.get(kind, slots)
    if causal_slots < slots:
        mask = model.config.mask_token_id
        require(mask is not None, "a draft needs masks, but this model's config has no mask_token_id")
        tokens = tokens.clone()
        tokens[:, causal_slots:] = mask or 0
    if kind == "draft":
        layout, rows = draft(slots - 1, str(device)), slice(1, None)
    elif kind == "single":
        layout = single_forward(decoding.draft_tokens, levels, str(device))
        rows = slice(2 * decoding.draft_tokens + 1)  # the blocks' rows cost the same, whichever is projected
    return Point(cache, tokens, layout, rows, decoding)


def _decoding_of(kind: ForwardKind, slots: int, levels: tuple[int, ...]) -> DecodingConfig:
    """Settings with such a forward in their step."""
    if kind == "decode":
        return DecodingConfig()
    if kind != "single":
        return DecodingConfig("two_forward", draft_tokens=max(1, slots - 1))
    width, rest = divmod(slots, 1 + len(levels))
    require(
        rest == 0 and width >= 2,
        f"a single forward has (K + 1) * (1 + {len(levels)}) slots for the levels {levels}, but got {slots}",
    )
    return DecodingConfig("single_forward", draft_tokens=width - 1, proposal_levels=levels)


def sample_seconds(run: Callable[[], Any], device: torch.device, repeats: int, warmup: int) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` unrecorded ones; a GPU is waited for around each call."""
    samples = []
    for index in range(warmup + repeats):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        if index >= warmup:
            samples.append(time.perf_counter() - began)
    return samples


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


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dtype_of(model: Zaya) -> DType:
    """The weights' dtype by name."""
    name = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise known("dtype", name, DTYPE_BYTES)
    return name  # type: ignore[return-value]


def record(
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
    """A record made now. counted: the fields of a `Measurement` that its kind has besides."""
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
