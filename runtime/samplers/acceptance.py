"""Accept or reject drafts so that what is committed follows the target distribution (arXiv 2211.17192).

A draft x with draft probability q(x) and target probability p(x) is accepted with min(1, p / q); the first rejected
position is redrawn from max(p - q, 0); when all drafts pass, a bonus token is drawn from the row behind them. An argmax
draft has q = 1 at the draft. With mixing, p of the K draft rows comes from w * AR + (1 - w) * draft logits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Draft(NamedTuple):
    """K drafts per sequence."""

    tokens: Tensor  # int64 [B, K]
    logits: Tensor  # [B, K, V] that they were drawn from
    temperatures: Tensor  # float32 [K] they were drawn at; 0 is argmax
    lengths: Tensor | None = None  # int64 [B], the leading drafts that count; None: all K

    def select(self, rows: list[int]) -> Draft:
        """Only these sequences, in this order."""
        lengths = None if self.lengths is None else self.lengths[rows]
        # Logits that nobody reads are one number, expanded: no copy may make them real.
        unread = self.logits.stride(0) == 0
        logits = self.logits[:1].expand(len(rows), -1, -1) if unread else self.logits[rows]
        return Draft(self.tokens[rows], logits, self.temperatures, lengths)

    def leading(self, batch: int) -> Draft:
        """The first sequences, as views."""
        lengths = None if self.lengths is None else self.lengths[:batch]
        return Draft(self.tokens[:batch], self.logits[:batch], self.temperatures, lengths)


class Accepted(NamedTuple):
    """What a verification commits: the first `count` drafts, then `token`."""

    count: Tensor  # int64 [B]
    token: Tensor  # int64 [B]


class Sampling(Protocol):
    """Draws and judges on the device: `Plain`, or the Triton kernels. No call reads a value back."""

    def draw(self, logits: Tensor, temperatures: Tensor, uniform: Tensor | None) -> Tensor:
        """One token per row, int64 [B, K], as `draw`."""

    def verify(
        self, ar_logits: Tensor, draft: Draft, temperature: float, mixing_weight: float, uniform: Tensor | None
    ) -> Accepted:
        """Decide on drafts, as `verify`."""


class Plain:
    """The reference: this module's functions."""

    def draw(self, logits: Tensor, temperatures: Tensor, uniform: Tensor | None) -> Tensor:
        """As `draw`."""
        return draw(logits, temperatures, uniform)

    def verify(
        self, ar_logits: Tensor, draft: Draft, temperature: float, mixing_weight: float, uniform: Tensor | None
    ) -> Accepted:
        """As `verify`."""
        return verify(ar_logits, draft, temperature, mixing_weight, uniform)


class Randomness:
    """One random stream per sequence, so that a sequence's draws do not depend on its neighbours."""

    def __init__(self, seed: int, sequences: int) -> None:
        # NumPy mixes (seed, i) into a whole state; torch's CPU generator looks at the low 32 bits of a seed only.
        self.generators = [np.random.default_rng([seed, i]) for i in range(sequences)]

    def select(self, rows: list[int]) -> None:
        """Keep only these sequences' streams."""
        self.generators = [self.generators[r] for r in rows]

    def uniform(self, count: int, device: torch.device) -> Tensor:
        """float64 [B, count] in [0, 1)."""
        return torch.from_numpy(np.stack([g.random(count) for g in self.generators])).to(device)


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: str) -> Tensor:
    """These values on a device. Kept for good: a step that is captured in a graph can copy nothing from the host, and
    its replays read the address that was captured.
    """
    return torch.tensor(values, dtype=dtype, device=device)


def choose(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index by inverse CDF. weights [..., V] >= 0 with any positive sum, uniform [...] -> int64 [...]."""
    cumulative = weights.double().cumsum(-1)
    target = uniform[..., None].to(cumulative.dtype) * cumulative[..., -1:]
    # right=True: an index of weight zero is never drawn, not even by a uniform of exactly 0.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_max(weights.shape[-1] - 1)


def draw(logits: Tensor, temperatures: Tensor, uniform: Tensor | None) -> Tensor:
    """One token int64 [B, K] per row of logits [B, K, V]: the argmax, or a draw at the row's temperature > 0.

    temperatures: float32 [K]. uniform: float64 [B, K] in [0, 1); None when every row is an argmax.
    """
    tokens = logits.argmax(-1)
    if uniform is None:
        return tokens
    warm = temperatures > 0
    scaled = logits.float() / torch.where(warm, temperatures, 1.0)[:, None]
    return torch.where(warm, choose(torch.softmax(scaled, -1), uniform), tokens)


def mix(ar_logits: Tensor, draft: Draft | None, mixing_weight: float) -> Tensor:
    """The target's float32 logits [B, R, V]: of the K rows that judge a draft, w * AR + (1 - w) * draft."""
    target = ar_logits.float()
    if draft is None or mixing_weight == 1:
        return target
    drafts = draft.tokens.shape[1]
    mixed = mixing_weight * target[:, :drafts] + (1 - mixing_weight) * draft.logits
    mixed = torch.where(_judged(draft)[..., None], mixed, target[:, :drafts])
    return torch.cat([mixed, target[:, drafts:]], dim=1)


def verify(
    ar_logits: Tensor, draft: Draft, temperature: float, mixing_weight: float, uniform: Tensor | None
) -> Accepted:
    """Decide on K drafts from the verifier's logits [B, K + 1, V].

    Row j judges draft j. The bonus token comes from the row behind a sequence's last draft, which is never mixed.
    uniform: float64 [B, K + 1] in [0, 1), the last one for the token; None at temperature 0, which draws nothing.
    """
    drafts, judged = draft.tokens.shape[1], _judged(draft)
    target = mix(ar_logits, draft, mixing_weight)
    if temperature == 0:
        best = target.argmax(-1)
        count = ((best[:, :drafts] == draft.tokens) & judged).long().cumprod(1).sum(1)
        return Accepted(count, best.gather(1, count[:, None]).squeeze(1))
    assert uniform is not None
    p = torch.softmax(target / temperature, -1)
    q = draft_probabilities(draft)
    index = draft.tokens[..., None]
    accept = uniform[:, :drafts] * q.gather(-1, index).squeeze(-1) < p[:, :drafts].gather(-1, index).squeeze(-1)
    count = (accept & judged).long().cumprod(1).sum(1)
    row = count[:, None, None].expand(-1, 1, p.shape[-1])
    p = p.gather(1, row).squeeze(1)  # of the row that decides, [B, V]
    q = q.gather(1, row.clamp_max(drafts - 1)).squeeze(1)
    remaining = torch.where((count == judged.sum(1))[:, None], p, (p - q).clamp_min(0))
    # Where p and q differ by rounding only, a draft can be rejected with nothing left over: redraw it from p.
    remaining = torch.where(remaining.sum(-1, keepdim=True) > 0, remaining, p)
    return Accepted(count, choose(remaining, uniform[:, drafts]))


def _judged(draft: Draft) -> Tensor:
    """Which drafts count, bool [B, K]."""
    if draft.lengths is None:
        return torch.ones_like(draft.tokens, dtype=torch.bool)
    return torch.arange(draft.tokens.shape[1], device=draft.tokens.device) < draft.lengths[:, None]


def draft_probabilities(draft: Draft) -> Tensor:
    """q [B, K, V]: softmax at the row's temperature, or all of the mass on an argmax draft."""
    warm = (draft.temperatures > 0)[:, None]
    scaled = draft.logits.float() / torch.where(warm, draft.temperatures[:, None], 1.0)
    certain = torch.zeros_like(scaled).scatter_(-1, draft.tokens[..., None], 1.0)
    return torch.where(warm, torch.softmax(scaled, -1), certain)
