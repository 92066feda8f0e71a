"""Accept or reject drafts so that what is committed follows the target distribution (arXiv 2211.17192).

A draft x with draft probability q(x) and target probability p(x) is accepted with min(1, p / q); the first rejected
position is redrawn from max(p - q, 0); when all drafts pass, a bonus token is drawn from the row behind them. An argmax
draft has q = 1 at the draft. With mixing, p of the K draft rows comes from w * AR + (1 - w) * draft logits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Draft(NamedTuple):
    """K drafts per sequence."""

    tokens: Tensor  # int64 [B, K]
    logits: Tensor  # float32 [B, K, V] that they were drawn from
    temperatures: Tensor  # float32 [K] they were drawn at; 0 is argmax
    lengths: Tensor | None = None  # int64 [B], the leading drafts that count; None: all K

    def select(self, rows: list[int]) -> Draft:
        """Only these sequences, in this order."""
        lengths = None if self.lengths is None else self.lengths[rows]
        return Draft(self.tokens[rows], self.logits[rows], self.temperatures, lengths)


class Accepted(NamedTuple):
    """What a verification commits: the first `count` drafts, then `token`."""

    count: Tensor  # int64 [B]
    token: Tensor  # int64 [B]
    logits: Tensor  # float32 [B, K + 1, V] of the target that was sampled from


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


def choose(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index by inverse CDF. weights [..., V] >= 0 with any positive sum, uniform [...] -> int64 [...]."""
    cumulative = weights.double().cumsum(-1)
    target = uniform[..., None].to(cumulative.dtype) * cumulative[..., -1:]
    # right=True: an index of weight zero is never drawn, not even by a uniform of exactly 0.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_max(weights.shape[-1] - 1)


def sample(logits: Tensor, temperature: float, randomness: Randomness) -> Tensor:
    """One token per sequence from logits [B, V]; temperature 0 is argmax and draws nothing."""
    if temperature == 0:
        return logits.argmax(-1)
    uniform = randomness.uniform(1, logits.device)[:, 0]
    return choose(torch.softmax(logits / temperature, -1), uniform)


def draw_drafts(logits: Tensor, temperatures: Tensor, randomness: Randomness) -> Draft:
    """Draw one draft per row of float32 logits [B, K, V], each row at its own temperature [K]."""
    tokens = logits.argmax(-1)
    warm = temperatures > 0
    if bool(warm.any()):
        scaled = logits / torch.where(warm, temperatures, 1.0)[:, None]
        drawn = choose(torch.softmax(scaled, -1), randomness.uniform(logits.shape[1], logits.device))
        tokens = torch.where(warm, drawn, tokens)
    return Draft(tokens, logits, temperatures)


def verify(
    ar_logits: Tensor, draft: Draft, temperature: float, mixing_weight: float, randomness: Randomness
) -> Accepted:
    """Decide on K drafts from the verifier's float32 logits [B, K + 1, V].

    Row j judges draft j. The bonus token comes from the row behind a sequence's last draft, which is never mixed.
    """
    drafts = draft.tokens.shape[1]
    last = torch.full_like(draft.tokens[:, 0], drafts) if draft.lengths is None else draft.lengths  # the bonus rows
    judged = torch.arange(drafts, device=last.device) < last[:, None]  # [B, K]
    target = ar_logits
    if mixing_weight != 1:
        mixed = mixing_weight * ar_logits[:, :drafts] + (1 - mixing_weight) * draft.logits
        target = torch.cat([torch.where(judged[..., None], mixed, ar_logits[:, :drafts]), ar_logits[:, drafts:]], dim=1)
    if temperature == 0:
        best = target.argmax(-1)
        count = ((best[:, :drafts] == draft.tokens) & judged).long().cumprod(1).sum(1)
        return Accepted(count, best.gather(1, count[:, None]).squeeze(1), target)
    uniform = randomness.uniform(drafts + 1, ar_logits.device)
    p = torch.softmax(target / temperature, -1)
    q = draft_probabilities(draft)
    index = draft.tokens[..., None]
    accept = uniform[:, :drafts] * q.gather(-1, index).squeeze(-1) < p[:, :drafts].gather(-1, index).squeeze(-1)
    count = (accept & judged).long().cumprod(1).sum(1)
    row = count[:, None, None].expand(-1, 1, p.shape[-1])
    p = p.gather(1, row).squeeze(1)  # of the row that decides, [B, V]
    q = q.gather(1, row.clamp_max(drafts - 1)).squeeze(1)
    remaining = torch.where((count == last)[:, None], p, (p - q).clamp_min(0))
    # Where p and q differ by rounding only, a draft can be rejected with nothing left over: redraw it from p.
    remaining = torch.where(remaining.sum(-1, keepdim=True) > 0, remaining, p)
    return Accepted(count, choose(remaining, uniform[:, drafts]), target)


def draft_probabilities(draft: Draft) -> Tensor:
    """q [B, K, V]: softmax at the row's temperature, or all of the mass on an argmax draft."""
    warm = (draft.temperatures > 0)[:, None]
    scaled = draft.logits / torch.where(warm, draft.temperatures[:, None], 1.0)
    certain = F.one_hot(draft.tokens, draft.logits.shape[-1]).to(draft.logits.dtype)
    return torch.where(warm, torch.softmax(scaled, -1), certain)
