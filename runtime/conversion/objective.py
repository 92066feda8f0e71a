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

from runtime.config import ModelConfig
from runtime.layout import Layout, causal
from runtime.model.zaya import Zaya

_NONE = -100  # a label that carries no loss


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies in nats; `total` is what is minimised.

    A loss of a part of a batch is its labels' sum by the whole batch's count: over the parts they add up to the mean.
    """

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
    model: Zaya,
    tokens: Tensor,
    *,
    judged: Tensor | None = None,
    counts: tuple[int, int] | None = None,
    routes: list[Tensor] | None = None,
) -> Losses:
    """Plain language-model loss on int64 tokens [B, L + 1]; padding labels (the pad token) are left out.

    judged: bool [B, L + 1], the tokens that the loss is taken over (None: all), for fine-tuning on answers.
    counts: the label counts to divide by, where these rows are a part of a batch (None: their own).
    """
    labels, _ = _labels(model.config, tokens, judged, None)
    hidden = model.forward(tokens[:, :-1], causal(tokens.shape[1] - 1, str(tokens.device)), routes=routes)
    loss = _cross_entropy(model, hidden, labels, (counts or label_counts(model.config, tokens, judged))[0])
    return Losses(loss, loss.detach(), None)


def conversion_loss(
    model: Zaya,
    tokens: Tensor,
    starts: Tensor,
    *,
    alpha: float = 1.0,
    revealed: Tensor | None = None,
    judged: Tensor | None = None,
    counts: tuple[int, int] | None = None,
    routes: list[Tensor] | None = None,
) -> Losses:
    """(alpha * next-token loss + mask loss) / (1 + alpha) on int64 tokens [B, L + 1].

    Next-token labels are shifted by one, mask labels are not. `revealed` bool [B, L] marks positions of the mask half
    that hold their true token (for multi-step denoising); they and position 0 carry no mask loss. judged, counts: as
    in `next_token_loss`, for both losses.
    """
    clean = tokens[:, :-1]
    length = clean.shape[1]
    masked = torch.full_like(clean, model.config.mask_token_id or 0)
    if revealed is not None:
        masked = torch.where(revealed, clean, masked)
    next_labels, mask_labels = _labels(model.config, tokens, judged, revealed)
    counts = counts or label_counts(model.config, tokens, judged, revealed)
    hidden = model.forward(torch.cat([clean, masked], dim=1), conversion_layout(starts), routes=routes)
    next_token = _cross_entropy(model, hidden[:, :length], next_labels, counts[0])
    mask = _cross_entropy(model, hidden[:, length:], mask_labels, counts[1])
    return Losses((alpha * next_token + mask) / (1 + alpha), next_token.detach(), mask.detach())


def label_counts(
    config: ModelConfig, tokens: Tensor, judged: Tensor | None = None, revealed: Tensor | None = None
) -> tuple[int, int]:
    """How many labels the next-token and the mask loss of these rows are taken over."""
    next_labels, mask_labels = _labels(config, tokens, judged, revealed)
    return int((next_labels != _NONE).sum()), int((mask_labels != _NONE).sum())


def _labels(
    config: ModelConfig, tokens: Tensor, judged: Tensor | None, revealed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The labels of the clean and of the mask half, int64 [B, L] each, _NONE where no loss is taken."""
    wanted = tokens if judged is None else tokens.masked_fill(~judged, _NONE)
    if config.pad_token_id is not None:
        wanted = wanted.masked_fill(tokens == config.pad_token_id, _NONE)
    mask = wanted[:, :-1].clone()
    mask[:, 0] = _NONE
    return wanted[:, 1:], mask if revealed is None else mask.masked_fill(revealed, _NONE)


def _cross_entropy(model: Zaya, hidden: Tensor, labels: Tensor, count: int) -> Tensor:
    """The sum over the labels by `count`; 0, and no gradient, where there is none."""
    logits = model.project(hidden).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=_NONE, reduction="sum") / max(count, 1)
