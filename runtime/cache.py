"""The state of a batch of sequences: keys, values and CCA columns, all addressed by position.

Rejecting tokens only shortens a length: nothing is patched, because a slot's keys, values and columns are stored at its
position and are overwritten when that position is decoded again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hardware.files import UserError
from hardware.fingerprint import memory_bytes
from runtime.config import ModelConfig, require


class Cache:
    """Keys and values [B, capacity, KV heads, head_dim] and a ring of CCA columns [B, ring + 1, column] per layer.

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
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.config = config
        self.capacity = capacity
        self.ring = max_slots + config.conv_history
        self.lengths = [0] * batch
        self.written = [0] * batch  # the furthest position, plus one, that a column was written for
        kv = (batch, capacity, config.num_key_value_heads, config.head_dim)
        ring = (batch, self.ring + 1, config.query_size + config.kv_size + config.kv_size // 2)
        layers = range(config.num_hidden_layers)
        size = len(layers) * (2 * math.prod(kv) + math.prod(ring)) * dtype.itemsize
        try:
            # Linux promises more memory than there is and kills who uses it: what cannot fit is refused here.
            if device == "cpu" and size > memory_bytes():
                raise MemoryError
            self.keys = [torch.zeros(kv, dtype=dtype, device=device) for _ in layers]
            self.values = [torch.zeros(kv, dtype=dtype, device=device) for _ in layers]
            self.columns = [torch.zeros(ring, dtype=dtype, device=device) for _ in layers]
        except (RuntimeError, MemoryError) as error:  # torch's own out-of-memory error is a RuntimeError
            raise UserError(
                f"out of memory on {device}: a cache of batch {batch} and {capacity} positions takes {size:,} bytes "
                f"({str(error) or f'there are {memory_bytes():,}'})"
            ) from error

    @property
    def batch(self) -> int:
        """Sequences held."""
        return len(self.lengths)

    def wrote(self, counts: list[int]) -> None:
        """Note that a forward wrote the columns of `counts[b]` slots behind the lengths, accepted or not."""
        self.written = [max(w, n + c) for w, n, c in zip(self.written, self.lengths, counts, strict=True)]

    def advance(self, counts: list[int]) -> None:
        """Commit `counts[b]` of the slots that the last forward wrote for sequence b. All others are rejected."""
        self._move([n + c for n, c in zip(self.lengths, counts, strict=True)])

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
        self.lengths = lengths

    def select(self, rows: list[int]) -> None:
        """Keep only these sequences, in this order."""
        index = torch.tensor(rows, device=self.keys[0].device)
        for store in (self.keys, self.values, self.columns):
            for layer, tensor in enumerate(store):
                store[layer] = tensor.index_select(0, index)
        self.lengths = [self.lengths[r] for r in rows]
        self.written = [self.written[r] for r in rows]

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
