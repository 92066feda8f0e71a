"""The TiDAR training sequence and loss (arXiv 2511.08923), for any block lengths and offsets.

A training sequence is the clean tokens (causal) followed by a copy of them cut into blocks of masks. A block sees
itself in both directions and the clean tokens before it, never another block or its own clean tokens; its convolutions
start from the clean token before it. That is exactly what a draft forward sees at inference, for every block at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.layout import Layout, causal
from runtime.model.zaya import Zaya


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies in nats; `total` is what is minimised."""

    total: Tensor
    next_token: Tensor
    mask: Tensor | None


def block_starts(rng: np.random.Generator, batch: int, length: int, max_block: int) -> np.ndarray:
    """For every position the start of its block, int64 [batch, length]; lengths uniform in 1..max_block.

    Position 0 is a block of its own, because a block needs a clean token before it. The random length of the first
    blocks gives random offsets, so that any number of draft tokens at any place has been seen in training.
    """
    lengths = rng.integers(1, max_block + 1, size=(batch, length))
    ends = 1 + lengths.cumsum(1)  # where blocks end; far more of them than needed
    starts = np.zeros((batch, length), dtype=np.int64)
    for row in range(batch):
        cuts = np.concatenate([[0, 1], ends[row][ends[row] < length]])
        starts[row] = cuts[np.searchsorted(cuts, np.arange(length), side="right") - 1]
    return starts


def conversion_layout(starts: Tensor) -> Layout:
    """The layout of [clean tokens, masks], each of length L, from the block start of every position, int64 [B, L]."""
    batch, length = starts.shape
    device = starts.device
    position = torch.arange(length, device=device)
    clean = (position[:, None] >= position).expand(batch, -1, -1)
    prefix = position < starts[:, :, None]
    own = starts[:, :, None] == starts[:, None]
    visible = torch.cat([torch.cat([clean, torch.zeros_like(own)], -1), torch.cat([prefix, own], -1)], -2)
    first = starts == position
    previous = torch.cat(
        [(position - 1).expand(batch, -1), torch.where(first, position - 1, length + position - 1)], dim=-1
    )
    return Layout(position.repeat(2), visible, previous, 0)


def next_token_loss(
    model: Zaya, tokens: Tensor, *, judged: Tensor | None = None, routes: list[Tensor] | None = None
) -> Losses:
    """Plain language-model loss on int64 tokens [B, L + 1]; padding labels (the pad token) are left out.

    judged: bool [B, L + 1], the tokens that the loss is taken over (None: all), for fine-tuning on answers.
    """
    labels = tokens if judged is None else tokens.masked_fill(~judged, -100)
    hidden = model.forward(tokens[:, :-1], causal(tokens.shape[1] - 1, str(tokens.device)), routes=routes)
    loss = _cross_entropy(model, hidden, labels[:, 1:])
    return Losses(loss, loss.detach(), None)


def conversion_loss(
    model: Zaya,
    tokens: Tensor,
    starts: Tensor,
    *,
    alpha: float = 1.0,
    revealed: Tensor | None = None,
    judged: Tensor | None = None,
    routes: list[Tensor] | None = None,
) -> Losses:
    """(alpha * next-token loss + mask loss) / (1 + alpha) on int64 tokens [B, L + 1].

    Next-token labels are shifted by one, mask labels are not. `revealed` bool [B, L] marks positions of the mask half
    that hold their true token (for multi-step denoising); they and position 0 carry no mask loss. judged: bool
    [B, L + 1], the tokens that both losses are taken over (None: all).
    """
    clean = tokens[:, :-1]
    length = clean.shape[1]
    masked = torch.full_like(clean, model.config.mask_token_id or 0)
    wanted = tokens if judged is None else tokens.masked_fill(~judged, -100)
    labels = wanted[:, :-1].clone()
    labels[:, 0] = -100
    if revealed is not None:
        masked = torch.where(revealed, clean, masked)
        labels = labels.masked_fill(revealed, -100)
    hidden = model.forward(torch.cat([clean, masked], dim=1), conversion_layout(starts), routes=routes)
    next_token = _cross_entropy(model, hidden[:, :length], wanted[:, 1:])
    mask = _cross_entropy(model, hidden[:, length:], labels)
    return Losses((alpha * next_token + mask) / (1 + alpha), next_token.detach(), mask.detach())


def _cross_entropy(model: Zaya, hidden: Tensor, labels: Tensor) -> Tensor:
    if model.config.pad_token_id is not None:
        labels = labels.masked_fill(labels == model.config.pad_token_id, -100)
    return F.cross_entropy(model.project(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100)
