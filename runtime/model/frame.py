"""What all layers of one forward share: positions, masks, and where cached state is read and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from runtime.cache import Cache
from runtime.config import ModelConfig, require
from runtime.layout import Layout, predecessors
from runtime.model.rotary import Rotary

_FOLD_SLOTS = 64  # up to here the query heads of one KV head are folded into rows, so that K and V are read once

Rows: TypeAlias = slice | Tensor  # along one dimension; a slice where it does not wrap: a view costs less


@dataclass
class Frame:
    """B sequences, S slots, T keys (cached tokens, then the slots)."""

    rotary: dict[str, tuple[Tensor, Tensor, Tensor]]  # by layer type: cos, sin, swap index
    masks: dict[str, Tensor | None]  # by layer type, from `attention_mask`; None: every slot sees every key
    taps: Tensor | None  # int64 [S, history + 1] or [B, S, history + 1] into [cached columns, slots]; None: a chain
    committed: int  # leading slots whose columns are kept
    cache: Cache | None
    start: int | None = None  # the cached length when all sequences share it, else None
    total: int = 0  # T
    batch: Tensor | None = None  # int64 [B, 1] counting the sequences; needed when lengths differ
    rows: Tensor | None = None  # int64 [B, S]: cache rows of the slots, when lengths differ
    history: Rows | None = None  # ring entries of the last cached columns: along the ring, or int64 [B, history]
    kept: Rows | None = None  # ring entries that the kept columns go to: along the ring, or int64 [B, W]
    kept_slots: Tensor | None = None  # int64 [B, W]: which slots those are, in a ragged prefill; None: the first ones

    def _held(self, store: Tensor) -> Tensor:
        """The rows that hold a sequence."""
        assert self.cache is not None
        return store if len(self.cache.lengths) == self.cache.rows else store[: len(self.cache.lengths)]

    def past(self, layer: int) -> Tensor:
        """The cached columns before the first slot, oldest first: [B, history, column]."""
        assert self.cache is not None
        ring = self._held(self.cache.columns[layer])
        if isinstance(self.history, slice):
            return ring[:, self.history]
        assert self.history is not None
        if self.history.dim() == 1:
            return ring.index_select(1, self.history)
        return ring[self.batch, self.history]

    def keep(self, layer: int, columns: Tensor) -> None:
        """Write the committed slots' columns [B, S, column] into the ring, at their positions."""
        if self.cache is None or self.kept is None:
            return
        ring = self._held(self.cache.columns[layer])
        if self.kept_slots is not None:
            ring[self.batch, self.kept] = columns[self.batch, self.kept_slots]
        elif isinstance(self.kept, slice):
            ring[:, self.kept] = columns[:, : self.committed]
        elif self.kept.dim() == 1:
            ring.index_copy_(1, self.kept, columns[:, : self.committed])
        else:
            ring[self.batch, self.kept] = columns[:, : self.committed]

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, S, KV heads, D] behind the cached keys and values; return all of them as [B, KV heads, T, D]."""
        if self.cache is None:
            return key.transpose(1, 2), value.transpose(1, 2)
        keys, values = self._held(self.cache.keys[layer]), self._held(self.cache.values[layer])
        if self.start is not None:
            keys[:, self.start : self.total] = key
            values[:, self.start : self.total] = value
        else:
            keys[self.batch, self.rows] = key
            values[self.batch, self.rows] = value
        return keys[:, : self.total].transpose(1, 2), values[:, : self.total].transpose(1, 2)


def build_frame(
    config: ModelConfig,
    rotary: Rotary,
    layout: Layout,
    cache: Cache | None,
    *,
    batch: int,
    counts: list[int] | None,
    dtype: torch.dtype,
) -> Frame:
    """The frame of one forward. `counts`: real leading slots per sequence of a ragged prefill."""
    slots, device = layout.slots, layout.offsets.device
    lengths = cache.lengths if cache is not None else [0] * batch
    require(len(lengths) == batch, f"the cache holds {len(lengths)} sequences, but got {batch}")
    longest = max(lengths)
    start = longest if min(lengths) == longest else None
    total = longest + slots
    if cache is not None:
        require(total <= cache.capacity, f"{total} positions do not fit the cache of {cache.capacity}")
    kinds = sorted(set(config.layer_types))
    if start is not None and layout.contiguous:
        where: slice | Tensor = slice(start, total)
    else:
        where = layout.offsets + (start if start is not None else torch.tensor(lengths, device=device)[:, None])
    frame = Frame(
        rotary={kind: rotary.factors(kind, where, total, dtype, device) for kind in kinds},
        masks={kind: _mask(config, kind, layout, lengths, start, dtype) for kind in kinds},
        taps=None if layout.previous is None else predecessors(layout.previous, config.conv_history),
        committed=layout.committed,
        cache=cache,
        start=start,
        total=total,
    )
    if cache is not None:
        _place(frame, layout, cache, counts, config.conv_history)
        if layout.committed:
            cache.wrote(counts or [layout.committed] * batch)
    return frame


def _place(frame: Frame, layout: Layout, cache: Cache, counts: list[int] | None, history: int) -> None:
    """Where this forward reads and writes the cache."""
    device, slots, ring = layout.offsets.device, layout.slots, cache.ring
    simple = counts is None and layout.committed <= ring
    if frame.start is not None:
        frame.history = _wrapped(frame.start - history, history, ring, device)
        if simple:
            frame.kept = _wrapped(frame.start, layout.committed, ring, device) if layout.committed else None
            return
    length = torch.tensor(cache.lengths, device=device)[:, None]
    frame.batch = torch.arange(cache.batch, device=device)[:, None]
    if frame.start is None:
        frame.rows = length + torch.arange(slots, device=device)
        frame.history = (length + torch.arange(-history, 0, device=device)) % ring
    if simple:
        if layout.committed:
            frame.kept = (length + torch.arange(layout.committed, device=device)) % ring
        return
    # A prefill: the last columns of every sequence; what lies before its first slot goes to the entry never read.
    real = torch.tensor(counts or [layout.committed] * cache.batch, device=device)[:, None]
    last = real - min(ring, slots) + torch.arange(min(ring, slots), device=device)
    frame.kept = torch.where(last < 0, ring, (length + last) % ring)
    frame.kept_slots = last.clamp_min(0)


def _wrapped(begin: int, count: int, ring: int, device: torch.device) -> Rows:
    first = begin % ring
    if first + count <= ring:
        return slice(first, first + count)
    return torch.arange(begin, begin + count, device=device) % ring


def folds(slots: int) -> bool:
    """Whether attention folds the query heads of a KV head into rows: K and V are then read once for all of them."""
    return slots <= _FOLD_SLOTS


def attention_mask(visible: Tensor, repeat: int, dtype: torch.dtype) -> Tensor:
    """The additive mask that attention takes, from bool [1 or B, S, T] and the query heads per KV head."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    mask = mask.unsqueeze(1)
    return mask.repeat(1, 1, repeat, 1) if folds(visible.shape[1]) else mask


def _mask(
    config: ModelConfig, kind: str, layout: Layout, lengths: list[int], start: int | None, dtype: torch.dtype
) -> Tensor | None:
    """What the slots see of the T keys: cached tokens up to their sequence's length, then slots."""
    slots, window = layout.slots, config.sliding_window if kind == "hybrid_sliding" else None
    total = max(lengths) + slots
    if start is not None and slots == 1 and (window is None or total <= window):
        return None
    device = layout.offsets.device
    visible = layout.visible
    if visible is None:
        visible = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()
    length = torch.tensor(lengths[:1] if start is not None else lengths, device=device)[:, None]
    if start is not None:
        visible = visible if visible.dim() == 3 else visible[None]
        seen = torch.cat([visible.new_ones(visible.shape[0], slots, start), visible], dim=-1)
    else:
        slot = torch.arange(total, device=device) - length  # [B, T]: which slot a cache row holds, if any
        index = slot.clamp(0, slots - 1)
        among = visible.expand(len(lengths), slots, slots).gather(2, index[:, None].expand(-1, slots, -1))
        seen = (slot < 0)[:, None] | (among & ((slot >= 0) & (slot < slots))[:, None])
    if window is not None:
        offsets = layout.offsets if layout.offsets.dim() == 2 else layout.offsets[None]
        row = torch.arange(total, device=device)
        slot = (row - length).clamp(0, slots - 1)  # [1 or B, T]
        shape = (max(len(slot), len(offsets)), total)
        own = offsets.expand(shape[0], -1).gather(1, slot.expand(shape))
        keys = torch.where(row < length, row, length + own)
        seen = seen & ((length + offsets)[:, :, None] - keys[:, None] < window)
    return attention_mask(seen, config.num_attention_heads // config.num_key_value_heads, dtype)
