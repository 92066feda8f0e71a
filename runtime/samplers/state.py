"""What a sampler works on, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hardware.files import UserError
from runtime.cache import Cache
from runtime.config import DecodingConfig
from runtime.layout import Layout, causal
from runtime.model.zaya import Zaya
from runtime.samplers.acceptance import Accepted, Draft, Plain, Randomness, Sampling, constant, mix

_COUNTED_AT_ONCE = 64  # forwards


class ForwardCounter:
    """Forwards of one kind: how many, how many token slots in all, and the distinct experts summed per layer."""

    def __init__(self) -> None:
        self.forwards = self.slots = 0
        self._experts: Tensor | None = None  # int64 [layers]
        self._routes: list[Tensor] = []  # of forwards not counted yet: many at once cost hardly more than one

    def add(self, slots: int, routes: Tensor, experts: int) -> None:
        """Count a forward of `slots` token slots that chose int [layers, slots] of so many experts."""
        self.forwards += 1
        self.slots += slots
        self._classes = experts + 1
        if self._routes and (routes.shape != self._routes[0].shape or len(self._routes) == _COUNTED_AT_ONCE):
            self._count()
        self._routes.append(routes)

    def merge(self, forwards: int, slots: int, experts: Tensor) -> None:
        """Count forwards whose distinct experts per layer, int64 [layers], have been added up."""
        self.forwards += forwards
        self.slots += slots
        self._experts = experts.clone() if self._experts is None else self._experts + experts

    def _count(self) -> None:
        routes, self._routes = torch.stack(self._routes), []
        self.merge(0, 0, distinct_experts(routes, self._classes).sum(0))

    @property
    def experts(self) -> Tensor | None:
        """Distinct experts int64 [layers], summed over forwards; the skip expert does not count."""
        if self._routes:
            self._count()
        return self._experts

    def experts_per_layer(self) -> list[float]:
        """Mean distinct experts that a forward ran, by layer."""
        return [] if self.experts is None else (self.experts.double() / self.forwards).tolist()


def distinct_experts(routes: Tensor, classes: int) -> Tensor:
    """How many experts, int64 [..., layers], occur in int [..., layers, N]; the last class, which skips, is none."""
    hit = torch.zeros(*routes.shape[:-1], classes, dtype=torch.int64, device=routes.device)
    return hit.scatter_(-1, routes.long(), 1)[..., :-1].sum(-1)


class TraceStep(NamedTuple):
    """The logits behind one step's tokens. Row r is the distribution that the r-th token of the step was drawn from."""

    sequences: list[int]  # which requests the B rows are
    logits: Tensor  # float32 [B, R, V] of the target; mixed where logits are mixed
    committed: list[int]  # how many of the R rows gave a token
    draft: Draft | None  # what was judged: of a verified step alone


class Step(NamedTuple):
    """What a step committed, all of it still on the device."""

    committed: Tensor  # int64 [B, 1 + W]: how many tokens a row commits, then those tokens, then what does not count
    logits: Tensor  # [B, R, V]: row r of the target, before mixing
    draft: Draft | None = None  # what was judged
    cached: bool = True  # the cache takes in what is committed, but its last token, which is the anchor

    @property
    def counts(self) -> Tensor:
        """int64 [B]."""
        return self.committed[:, 0]

    @property
    def tokens(self) -> Tensor:
        """int64 [B, W]."""
        return self.committed[:, 1:]


@dataclass
class Decode:
    """The sequences being decoded together. The anchor is a sequence's last committed token, not yet in the cache."""

    model: Zaya
    cache: Cache
    decoding: DecodingConfig
    anchors: Tensor  # int64 [B, 1]
    randomness: Randomness
    sequences: list[int]  # the request that each row decodes
    counters: dict[str, ForwardCounter] = field(default_factory=dict)
    trace: list[TraceStep] | None = None  # filled by the samplers when it is a list
    drafted: Draft | None = None  # drafts for the next step, of a sampler that drafts ahead
    behind: list[list[int]] | None = None  # per row, committed tokens ahead of the anchor that the cache lacks
    sampling: Sampling = field(default_factory=Plain)

    @property
    def mask_token(self) -> int:
        """The token that stands for an undecided one. UserError when the model has none."""
        token = self.model.config.mask_token_id
        if token is None:
            raise UserError(f"{self.decoding.sampler} drafts with masks, but this model's config has no mask_token_id")
        return token

    @property
    def pending(self) -> list[list[int]]:
        """Per row, the committed tokens that the cache lacks: those behind, then the anchor."""
        behind = self.behind or [[]] * len(self.sequences)
        return [[*row, *anchor] for row, anchor in zip(behind, self.anchors.tolist(), strict=True)]

    def forward(self, kind: str, tokens: Tensor, layout: Layout, *, counts: list[int] | None = None) -> Tensor:
        """Run and count one forward; hidden states [B, S, hidden]. counts: kept slots per row where they differ."""
        hidden, routes = self.model.run(tokens, layout, self.cache, counts=counts)
        counter = self.counters.get(kind)
        if counter is None:
            counter = self.counters[kind] = ForwardCounter()
        counter.add(tokens.numel(), routes, self.model.config.num_experts)
        return hidden

    def project(self, hidden: Tensor) -> Tensor:
        """The logits [B, R, V] of hidden states [B, R, hidden]."""
        return self.model.project(hidden)

    def draw(self, logits: Tensor, temperatures: tuple[float, ...], randomness: Randomness | None = None) -> Draft:
        """One token per row of logits [B, K, V], at K temperatures, of which 0 is argmax.

        The uniforms are the decode's unless others are given; they are drawn when any row needs one.
        """
        uniform = None
        if any(temperatures):
            uniform = (randomness or self.randomness).uniform(len(temperatures), logits.device)
        on_device = constant(temperatures, torch.float32, str(logits.device))
        return Draft(self.sampling.draw(logits, on_device, uniform), logits, on_device)

    def verify(self, logits: Tensor, draft: Draft) -> Accepted:
        """Decide on K drafts from the verifier's logits [B, K + 1, V], as the settings say."""
        decoding, uniform = self.decoding, None
        if decoding.temperature:
            uniform = self.randomness.uniform(logits.shape[1], logits.device)
        return self.sampling.verify(logits, draft, decoding.temperature, decoding.mixing_weight, uniform)

    def select(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        if not rows:
            self.sequences, self.drafted, self.behind = [], None, None
            return
        self.cache.select(rows)
        self.randomness.select(rows)
        self.anchors = self.anchors[rows]
        self.sequences = [self.sequences[r] for r in rows]
        if self.drafted is not None:
            self.drafted = self.drafted.select(rows)
        if self.behind is not None:
            self.behind = [self.behind[r] for r in rows]

    def put(self, rows: list[int], source: Decode) -> None:
        """Replace these rows by all sequences of `source`, in order; the others stay in place. They have no drafts."""
        self.anchors = self.anchors.clone()
        self.anchors[rows] = source.anchors
        for index, row in enumerate(rows):
            self.cache.put(row, source.cache, index)
            self.randomness.generators[row] = source.randomness.generators[index]
            self.sequences[row] = source.sequences[index]
            if self.behind is not None:
                self.behind[row] = []
        if self.drafted is not None:
            tokens, lengths = self.drafted.tokens, self.drafted.lengths
            lengths = torch.full_like(tokens[:, 0], tokens.shape[1]) if lengths is None else lengths.clone()
            lengths[rows] = 0
            self.drafted = self.drafted._replace(lengths=lengths)

    def settle(self) -> None:
        """Bring the cache up to the anchors and drop drafts, so that any sampler can go on from here."""
        behind, self.drafted, self.behind = self.behind or [], None, None
        counts = [len(row) for row in behind]
        if any(counts):
            width, device = max(counts), self.anchors.device
            padded = torch.tensor([row + [0] * (width - len(row)) for row in behind], device=device)
            self.forward("settle", padded, causal(width, str(device)), counts=counts)
            self.cache.advance(counts)


def commit(decode: Decode, logits: Tensor, draft: Draft, accepted: Accepted) -> Step:
    """Move the anchors behind a verification from logits [B, K + 1, V]; what it commits."""
    decode.anchors = accepted.token[:, None]
    count = accepted.count[:, None] + 1
    committed = torch.cat([count, F.pad(draft.tokens, (0, 1))], dim=1).scatter_(1, count, decode.anchors)
    return Step(committed, logits, draft)


def finish(decode: Decode, step: Step) -> list[list[int]]:
    """The host's part of a step: read what it committed, the only transfer, and follow it. Tokens per sequence."""
    rows = step.committed.tolist()
    tokens = [row[1 : 1 + row[0]] for row in rows]
    counts = [len(row) for row in tokens]
    if step.cached:
        decode.cache.advance(counts)
    else:
        decode.behind = [row[:-1] for row in tokens]
    if decode.trace is not None:
        logits = mix(step.logits, step.draft, decode.decoding.mixing_weight)
        decode.trace.append(TraceStep(list(decode.sequences), logits, counts, step.draft))
    return tokens
