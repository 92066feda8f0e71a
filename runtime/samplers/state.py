"""What a sampler works on, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.cache import Cache
from runtime.config import DecodingConfig
from runtime.layout import Layout
from runtime.model.zaya import Zaya
from runtime.samplers.acceptance import Randomness


@dataclass
class ForwardCounter:
    """Forwards of one kind: how many, how many token slots in all, and the distinct experts summed per layer."""

    forwards: int = 0
    slots: int = 0
    experts: Tensor | None = None  # int64 [layers], summed over forwards; the skip expert does not count

    def experts_per_layer(self) -> list[float]:
        """Mean distinct experts that a forward ran, by layer."""
        return [] if self.experts is None else (self.experts.double() / self.forwards).tolist()


@dataclass
class Decode:
    """The sequences being decoded together. The anchor is a sequence's last committed token, not yet in the cache."""

    model: Zaya
    cache: Cache
    decoding: DecodingConfig
    anchors: Tensor  # int64 [B, 1]
    randomness: Randomness
    counters: dict[str, ForwardCounter] = field(default_factory=dict)

    def forward(self, kind: str, tokens: Tensor, layout: Layout) -> Tensor:
        """Run and count one forward; hidden states [B, S, hidden]."""
        routes: list[Tensor] = []
        hidden = self.model.forward(tokens, layout, self.cache, routes=routes)
        counter = self.counters.setdefault(kind, ForwardCounter())
        counter.forwards += 1
        counter.slots += tokens.numel()
        experts = self.model.config.num_experts
        hit = torch.zeros(len(routes), experts + 1, dtype=torch.int64, device=tokens.device)
        distinct = hit.scatter_(1, torch.stack(routes), 1)[:, :experts].sum(1)
        counter.experts = distinct if counter.experts is None else counter.experts + distinct
        return hidden
