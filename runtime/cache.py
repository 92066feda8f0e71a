"""The state of a batch of sequences: keys, values and CCA columns, all addressed by position.

Rejecting tokens only shortens a length: nothing is patched, because a slot's keys, values and columns are stored at its
position and are overwritten when that position is decoded again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hardware.files import UserError
from hardware.fingerprint import memory_bytes
from runtime.config import ModelConfig, require


class Cache:
    """Keys, values [rows, capacity, KV heads, head_dim] and a ring of CCA columns [rows, ring + 1, column] per layer.

    The sequences held are the leading rows; the others are free. Tensors stay where they are for the cache's life:
    sequences that leave or come only move rows, so that a graph that was captured on them stays valid.

    A column is what later positions need of a token: its query|key projections before the convolutions and its
    delayed half of the value. The ring keeps `conv_history` columns before the oldest length a rollback can return
    to, so it holds `max_slots + conv_history` of them; one more entry takes writes of padding, and is never read.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        max_slots: int,
        *,
        rows: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """batch: empty sequences to begin with. rows: the most that can be held, by default those."""
        self.config = config
        self.rows = batch if rows is None else rows
        require(batch <= self.rows, f"batch <= rows must hold, but got {batch} and {self.rows}")
        self.capacity = capacity
        self.ring = max_slots + config.conv_history
        self.lengths = [0] * batch
        self.written = [0] * batch  # the furthest position, plus one, that a column was written for
        self.bound: Any = None  # what an engine keeps of this cache: `runtime.engines.Bound`
        kv = (self.rows, capacity, config.num_key_value_heads, config.head_dim)
        ring = (self.rows, self.ring + 1, config.query_size + config.kv_size + config.kv_size // 2)
        layers = range(config.num_hidden_layers)
        size = len(layers) * (2 * math.prod(kv) + math.prod(ring)) * dtype.itemsize
        try:
            # Linux promises more memory than there is and kills who uses it: what cannot fit is refused here.
            if device == "cpu" and size > memory_bytes():
                raise MemoryError
            self.keys = [torch.zeros(kv, dtype=dtype, device=device) for _ in layers]
            self.values = [torch.zeros(kv, dtype=dtype, device=device) for _ in layers]
            self.columns = [torch.zeros(ring, dtype=dtype, device=device) for _ in layers]
            self._lengths = torch.zeros(self.rows, dtype=torch.int32, device=device)
            self._on_host = self._lengths.numpy() if self._lengths.device.type == "cpu" else None
            self._stale = any(self.lengths)  # whether the host's lengths have changed since they were copied
        except (RuntimeError, MemoryError) as error:  # torch's own out-of-memory error is a RuntimeError
            raise UserError(
                f"out of memory on {device}: a cache of batch {self.rows} and {capacity} positions takes {size:,} "
                f"bytes ({str(error) or f'there are {memory_bytes():,}'})"
            ) from error

    @property
    def batch(self) -> int:
        """Sequences held."""
        return len(self.lengths)

    def reset(self, batch: int) -> None:
        """Hold so many empty sequences instead. UserError beyond the rows."""
        require(batch <= self.rows, f"the cache has {self.rows} rows, but got {batch} sequences")
        for columns in self.columns:  # what a first token finds before it is zero
            columns.zero_()
        self.lengths, self.written, self._stale = [0] * batch, [0] * batch, True

    def wrote(self, counts: list[int]) -> None:
        """Note that a forward wrote the columns of `counts[b]` slots behind the lengths, accepted or not."""
        self.written = [max(w, n + c) for w, n, c in zip(self.written, self.lengths, counts, strict=True)]

    def device_lengths(self) -> Tensor:
        """The lengths as int32 [rows] on the cache's device, 0 for free rows: always the same tensor."""
        if self._stale:
            lengths = self.lengths + [0] * (self.rows - self.batch)
            if self._on_host is not None:
                self._on_host[:] = lengths
            else:  # from pinned memory nobody has to wait for the copy
                pinned = torch.tensor(lengths, dtype=torch.int32, pin_memory=True)
                self._lengths.copy_(pinned, non_blocking=True)
            self._stale = False
        return self._lengths

    def advance(self, counts: list[int], *, on_device: bool = False) -> None:
        """Commit `counts[b]` of the slots that the last forward wrote for sequence b. All others are rejected.

        on_device: a step has added them to `device_lengths()` itself, where they are not copied again.
        """
        stale = self._stale or not on_device
        self._move([n + c for n, c in zip(self.lengths, counts, strict=True)])
        self._stale = stale

    def rollback(self, lengths: list[int]) -> None:
        """Shorten the sequences. UserError for a length whose columns the ring no longer has, or for a longer one."""
        for old, new in zip(self.lengths, lengths, strict=True):
            require(0 <= new <= old, f"a rollback shortens: 0 <= length <= {old} must hold, but got {new}")
        self._move(list(lengths))

    def _move(self, lengths: list[int]) -> None:
        slack = self.ring - self.config.conv_history
        for new, written in zip(lengths, self.written, strict=True):
            require(
                written - slack <= new <= written,
                f"a length must be at most {slack} short of the {written} positions written, but got {new}",
            )
        self.lengths, self._stale = lengths, True

    def select(self, rows: list[int]) -> None:
        """Keep only these sequences, in this order; the same one may be taken twice. UserError beyond the rows.

        Costs a copy of the sequences that change their row: to fill a gap with the last one is the cheapest.
        """
        require(len(rows) <= self.rows, f"the cache has {self.rows} rows, but got {len(rows)} sequences")
        moved = [(to, row) for to, row in enumerate(rows) if to != row]
        if moved:
            to, source = torch.tensor(moved, device=self.keys[0].device).T
            longest = max(self.lengths[row] for _, row in moved)
            for layer in range(self.config.num_hidden_layers):
                for store in (self.keys[layer], self.values[layer]):
                    store[to, :longest] = store[source, :longest]
                self.columns[layer][to] = self.columns[layer][source]
        self.written = [self.written[r] for r in rows]
        self.lengths, self._stale = [self.lengths[r] for r in rows], True

    def put(self, row: int, source: Cache, source_row: int) -> None:
        """Replace one sequence by another cache's, in place. UserError unless the rings are equal and it fits."""
        length = source.lengths[source_row]
        require(source.ring == self.ring, f"the rings must be equal, but are {source.ring} and {self.ring}")
        require(length <= self.capacity, f"{length} positions do not fit the cache of {self.capacity}")
        for layer in range(self.config.num_hidden_layers):
            self.keys[layer][row, :length] = source.keys[layer][source_row, :length]
            self.values[layer][row, :length] = source.values[layer][source_row, :length]
            self.columns[layer][row] = source.columns[layer][source_row]
        self.lengths[row], self.written[row] = length, source.written[source_row]
        self._stale = True

    def state(self, row: int) -> dict[str, Tensor]:
        """Everything the next forward can read of one sequence, by name: for comparing two histories."""
        n, h = self.lengths[row], self.config.conv_history
        ring = [(n - h + i) % self.ring for i in range(h)]
        named: dict[str, Tensor] = {}
        for layer in range(self.config.num_hidden_layers):
            named[f"layers.{layer}.keys"] = self.keys[layer][row, :n]
            named[f"layers.{layer}.values"] = self.values[layer][row, :n]
            named[f"layers.{layer}.columns"] = self.columns[layer][row, ring]
        return named
