"""Block attention in plain torch: the slots of one forward over the cached keys and values, and over each other."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.model.attention import attend
from runtime.model.frame import attention_mask


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slots: int,
    visible: Tensor | None,
    offsets: Tensor,
    window: int | None,
) -> Tensor:
    """query [B * slots, heads, D]; keys, values [rows >= B, capacity, KV heads, D] -> [B * slots, heads * D].

    Slot s of sequence b sees the cached rows below lengths[b] (int32 [B]), and of its own sequence's slots, which lie
    in the rows from lengths[b] on, those t with visible[s, t] != 0 (int8 [slots, slots]; None: t <= s). With a window
    it sees only keys whose position is above its own less the window. A cached row's position is its index, that of
    slot t is lengths[b] + offsets[t] (int32 [slots]). lengths[b] + slots <= capacity must hold.

    Shapes depend on no value, so the whole capacity is read: what lies behind a sequence's slots must be finite.
    """
    batch, (heads, width), groups = len(lengths), query.shape[1:], keys.shape[2]
    seen = _seen(lengths, slots, keys.shape[1], visible, offsets, window)
    return attend(
        query.view(batch, slots, heads, width),
        keys[:batch].transpose(1, 2),
        values[:batch].transpose(1, 2),
        attention_mask(seen, heads // groups, query.dtype),
    ).view(batch * slots, heads * width)


def _seen(
    lengths: Tensor, slots: int, capacity: int, visible: Tensor | None, offsets: Tensor, window: int | None
) -> Tensor:
    """bool [B, slots, capacity]: which rows of the cache each slot sees."""
    device, batch = lengths.device, len(lengths)
    length = lengths.long()[:, None]
    row = torch.arange(capacity, device=device)
    own = row - length  # [B, capacity]: which slot a row holds
    slot = own.clamp(0, slots - 1)
    if visible is None:
        visible = torch.ones(slots, slots, dtype=torch.int8, device=device).tril()
    among = (visible != 0).expand(batch, slots, slots).gather(2, slot[:, None].expand(-1, slots, -1))
    seen = (own < 0)[:, None] | (among & (own < slots)[:, None])
    if window is not None:
        position = torch.where(own < 0, row, length + offsets.long()[slot])
        seen = seen & (length[..., None] + offsets.long()[:, None] - position[:, None] < window)
    return seen
