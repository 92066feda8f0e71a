"""An engine's forwards beside the eager ones, on the same weights and the same cached tokens.

Rounding decides between experts that are nearly equal, and what follows has other values for good reason: positions
that take another expert in some layer are counted, and held to nothing but that.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from runtime.batching import PREFILL_TOKENS
from runtime.bench import dtype_of, token_rows
from runtime.cache import Cache
from runtime.config import DecodingConfig, DType, KernelConfig, replace
from runtime.engines import bound
from runtime.layout import Layout, block, causal, draft, single_forward
from runtime.model.zaya import Zaya
from runtime.policy import using

REFERENCE = KernelConfig({1_000_000: "loop"})
# The largest error of a position's logits, of their largest magnitude. Sums in another order differ by some roundings
# of the type (2^-24, 2^-11, 2^-8) in each branch of a layer, and the residual stream, in fp32, adds up tens of them. A
# wrong mask, a lost tile or a slot too few changes logits by the order of their own size. Seen between engines that are
# right: 3e-6 in float32, 0.05 in bfloat16.
TOLERANCE: dict[DType, float] = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 0.15}
# The share of positions that may take another expert: hardly one in float32, where only ties can. In a narrow type near
# ties are many: over 40 layers of random weights 0.6 of the positions were seen to meet one.
REROUTED: dict[DType, float] = {"float32": 0.02, "float16": 0.5, "bfloat16": 0.9}
# The share of positions whose error is left out: one that attends to a rerouted one differs for the same good reason.
SPARED: dict[DType, float] = {"float32": 0.0, "float16": 0.002, "bfloat16": 0.002}
ODD_LENGTHS = (5, 18, 31)  # cached tokens of three sequences
ODD_DRAFTS = 6  # 7 slots of a draft and of a verification
ODD_LEVELS = (0, 2, 5)
_MOST_TOKENS, _LEAST_CONTEXT = 1 << 16, 512  # of all sequences, and of one in any case
_ROWS_AT_ONCE = 256  # of the LM head: 262,272 logits take 1 MB a row
_KEPT_BYTES = 1 << 29  # of what eager forwards gave

Runs = list[tuple[Tensor, Tensor]]  # hidden states [N, hidden] and experts [layers, N] of forwards


@dataclass(frozen=True)
class Forward:
    """One forward of a step. tokens: slots that hold true tokens, masks: those behind them that hold masks."""

    kind: Literal["prefill", "causal", "draft", "single", "block"]
    tokens: int
    masks: int = 0
    levels: tuple[int, ...] = ()

    @property
    def slots(self) -> int:
        """Slots per sequence."""
        return self.tokens + self.masks

    def layout(self, device: str) -> Layout:
        """How the slots lie."""
        if self.kind == "draft":
            return draft(self.masks, device)
        if self.kind == "single":
            return single_forward(self.tokens - 1, self.levels, device)
        if self.kind == "block":
            return block(self.masks, (self.tokens,), device)
        return causal(self.tokens, device)


@dataclass(frozen=True)
class Agreement:
    """How far forwards were from the eager ones.

    error: the worst of a position's logits, relative to their largest magnitude, where both took the same experts;
    in a narrow type the worst but for a few of thousands.
    rerouted: share of positions that took another expert in some layer; argmax: share with the eager argmax.
    """

    error: float
    rerouted: float
    argmax: float
    positions: int

    def obstacle(self, dtype: DType) -> str | None:
        """Why this is more than rounding in this type, in words; None when it is not."""
        allowed = TOLERANCE[dtype]
        if not self.error <= allowed:  # NaN is not
            return f"logits are {self.error:.2g} of their size away from the eager ones, more than {allowed:g}"
        if self.rerouted * self.positions > REROUTED[dtype] * self.positions + 1:
            return f"{self.rerouted:.0%} of the positions take other experts than eagerly"
        return None


def forwards_of(decoding: DecodingConfig) -> list[Forward]:
    """What a step of these settings sends, each kind once."""
    count = decoding.draft_tokens
    if decoding.sampler == "autoregressive":
        return [Forward("causal", 1)]
    if decoding.sampler == "single_forward":
        return [Forward("single", count + 1, len(decoding.levels) * (count + 1), decoding.levels)]
    if decoding.sampler == "two_forward" or decoding.verify:
        return [Forward("draft", 1, count), Forward("causal", count + 1)]
    # A block that nothing verifies enters the cache with the first forward of the next one.
    return [Forward("block", count, count), *([Forward("block", 0, count)] if decoding.denoising_steps > 1 else [])]


def odd_forwards_of(decoding: DecodingConfig) -> list[Forward]:
    """The same kinds with a slot count that is no multiple of anything, and a prefill of ragged prompts."""
    changes: dict[str, Any] = {"draft_tokens": ODD_DRAFTS, "denoising_steps": min(decoding.denoising_steps, ODD_DRAFTS)}
    if decoding.sampler == "single_forward":
        changes["proposal_levels"] = ODD_LEVELS
    odd = replace(decoding, **changes) if decoding.drafts else decoding
    return [Forward("prefill", max(ODD_LENGTHS)), *forwards_of(odd)]


class Reference:
    """Compares forwards with the eager ones of one model, and keeps what the eager ones gave."""

    def __init__(self, model: Zaya) -> None:
        self._model = model
        self._caches: dict[tuple[int, ...], tuple[Cache, Tensor]] = {}
        self._kept: OrderedDict[tuple[Forward, tuple[int, ...]], Runs] = OrderedDict()
        self._odd: dict[str, Agreement] = {}

    def compare(self, decoding: DecodingConfig, kernels: KernelConfig, batch: int, context: int) -> Agreement:
        """Every kind of forward: at the workload's sizes, and at odd ones, as a batch that drains comes to them.

        batch, context: of the workload; the sequences have about so many cached tokens, not all the same, and fewer
        where the caches would take gigabytes.
        """
        context = min(context, max(_LEAST_CONTEXT, _MOST_TOKENS // batch))
        lengths = tuple(max(1, context - 3 * (row % 5)) for row in range(batch))
        found = [self._agreement(forward, kernels, lengths) for forward in forwards_of(decoding)]
        # The mode of these forwards at the odd sizes too, be they larger than its bucket.
        alike = replace(kernels, experts={1_000_000: kernels.expert_mode(batch * decoding.slots)})
        return _worst([*found, *(self._at_odd_sizes(forward, alike) for forward in odd_forwards_of(decoding))])

    def _at_odd_sizes(self, forward: Forward, kernels: KernelConfig) -> Agreement:
        """Once for each way of running it, of which threads are none: they divide the same work."""
        key = f"{forward} {replace(kernels, threads=None)}"
        if key not in self._odd:
            self._odd[key] = self._agreement(forward, kernels, ODD_LENGTHS)
        return self._odd[key]

    def _agreement(self, forward: Forward, kernels: KernelConfig, lengths: tuple[int, ...]) -> Agreement:
        key = (forward, lengths)
        found = self._run(forward, kernels, lengths)  # first, so that nothing eager is left for it to read
        if key not in self._kept:
            self._kept[key] = self._run(forward, REFERENCE, lengths)
            while len(self._kept) > 1 and sum(h.nbytes for runs in self._kept.values() for h, _ in runs) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return _worst([self._judge(*pair, kernels) for pair in zip(found, self._kept[key], strict=True)])

    @torch.inference_mode()
    def _run(self, forward: Forward, kernels: KernelConfig, lengths: tuple[int, ...]) -> Runs:
        """A forward, and where it keeps tokens a second one, that reads what the first one wrote."""
        model, batch = self._model, len(lengths)
        if forward.kind == "prefill":
            return self._prefill(kernels, lengths)
        device = str(model.model.embed_tokens.weight.device)
        layout = forward.layout(device)
        cache, text = self._cache(lengths, forward.slots, layout.committed)
        runs: Runs = []
        with using(model, kernels):
            for _ in range(2 if layout.committed else 1):
                tokens = torch.full((batch, forward.slots), model.config.mask_token_id or 0, device=device)
                for row, length in enumerate(cache.lengths):
                    tokens[row, : forward.tokens] = text[row, length : length + forward.tokens]
                hidden, routes = model.run(tokens, layout, cache)
                runs.append((hidden.flatten(0, 1).clone(), routes.clone()))
                cache.advance([1 + row % layout.committed if layout.committed else 0 for row in range(batch)])
        cache.rollback(list(lengths))
        return runs

    def _prefill(self, kernels: KernelConfig, lengths: tuple[int, ...]) -> Runs:
        """Ragged prompts into an empty cache, and a token behind each."""
        model, batch, width = self._model, len(lengths), max(lengths)
        device = str(model.model.embed_tokens.weight.device)
        text = torch.tensor(token_rows(model, batch, width + 1), device=device)
        cache = model.new_cache(batch, width + 1, 1)
        with using(model, kernels):
            hidden, routes = model.run(text[:, :width], causal(width, device), cache, counts=list(lengths))
            cache.advance(list(lengths))
            real = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
            runs = [(hidden[real], routes.view(-1, batch, width)[:, real])]
            hidden, routes = model.run(text[:, width:], causal(1, device), cache)
        return [*runs, (hidden.flatten(0, 1), routes)]

    def _cache(self, lengths: tuple[int, ...], slots: int, committed: int) -> tuple[Cache, Tensor]:
        """A cache with so many tokens per sequence, prefilled eagerly, and the rows of text it was filled from.

        What lies behind the lengths is filled with a number that no forward may use.
        """
        model, longest = self._model, max(lengths)
        needed = longest + committed + slots
        found = self._caches.get(lengths)
        if found is None or found[0].capacity < needed or found[0].ring < 2 * committed + model.config.conv_history:
            self._caches.pop(lengths, None)
            for key in [key for key in self._kept if key[1] == lengths]:  # of another text
                del self._kept[key]
            with using(model, REFERENCE):
                made = _ragged(model, lengths, needed, max(2 * committed, 64))
            found = self._caches[lengths] = made
        cache = found[0]
        device = cache.keys[0].device
        starts = torch.tensor(lengths, device=device)[:, None]
        behind = (torch.arange(cache.capacity, device=device) >= starts)[..., None, None]
        room = cache.ring - model.config.conv_history
        ring = (starts + torch.arange(room, device=device)) % cache.ring
        rows = torch.arange(len(lengths), device=device)[:, None]
        for layer in range(model.config.num_hidden_layers):
            cache.keys[layer].masked_fill_(behind, 7.0)
            cache.values[layer].masked_fill_(behind, 7.0)
            cache.columns[layer][rows, ring] = 7.0
        return found

    @torch.inference_mode()
    def _judge(self, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], kernels: KernelConfig) -> Agreement:
        same = (found[1] == expected[1]).all(0)
        alike, distances = 0, []
        for begin in range(0, len(same), _ROWS_AT_ONCE):
            part = slice(begin, begin + _ROWS_AT_ONCE)
            mine, true = self._logits(found[0][part], kernels), self._logits(expected[0][part], REFERENCE)
            alike += int((mine.argmax(-1) == true.argmax(-1)).sum())
            distances.append(((mine - true).abs().amax(-1) / true.abs().amax(-1))[same[part]])
        ranked = torch.cat(distances).sort(descending=True).values  # NaN comes first
        spared = 0 if ranked.isnan().any() else int(SPARED[dtype_of(self._model)] * len(ranked))
        error = float(ranked[spared]) if len(ranked) else 0.0
        return Agreement(error, 1 - float(same.float().mean()), alike / len(same), len(same))

    def _logits(self, hidden: Tensor, kernels: KernelConfig) -> Tensor:
        """By the engine's own head: float32 [N, V]."""
        with using(self._model, kernels) as used:
            if used.engine != "graphs":
                return self._model.project(hidden)
            cache, _ = next(iter(self._caches.values()))
            return bound(self._model, cache).forward.project(hidden).float()


def _ragged(model: Zaya, lengths: Sequence[int], capacity: int, max_slots: int) -> tuple[Cache, Tensor]:
    """Sequences of so many tokens in one cache, the text they come from having `capacity` tokens."""
    cache = model.new_cache(len(lengths), capacity, max_slots)
    device = cache.keys[0].device
    text = torch.tensor(token_rows(model, len(lengths), capacity), device=device)
    for begin in range(0, max(lengths), PREFILL_TOKENS):
        counts = [min(PREFILL_TOKENS, max(0, length - begin)) for length in lengths]
        part = text[:, begin : begin + max(counts)]
        model.forward(part, causal(max(counts), str(device)), cache, counts=counts)
        cache.advance(counts)
    return cache, text


def _worst(found: Sequence[Agreement]) -> Agreement:
    """Of several: the largest error, and shares of all positions."""
    total = sum(a.positions for a in found)
    return Agreement(
        max((a.error for a in found), key=lambda error: (math.isnan(error), error)),
        sum(a.rerouted * a.positions for a in found) / total,
        sum(a.argmax * a.positions for a in found) / total,
        total,
    )
