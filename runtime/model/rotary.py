"""Rotary embedding on the first part of each head, as two full-width factors."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.config import ModelConfig


class Rotary:
    """cos and sin tables per layer type, grown on demand.

    The rotation of the first R = head_dim * partial_rotary_factor entries, `x cos + rotate_half(x) sin`, is written
    as `x * cos + x[..., swap] * sin` with the sign of rotate_half in `sin`; behind R, cos is 1 and sin is 0.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._tables: dict[tuple[str, str, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._swaps: dict[tuple[str, str], Tensor] = {}

    def factors(self, kind: str, positions: Tensor, dtype: torch.dtype, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin [..., 1, head_dim] at `positions` [...], all below `end`; and the swap index [head_dim]."""
        key = (kind, str(positions.device), dtype)
        table = self._tables.get(key)
        if table is None or table[0].shape[0] < end:
            size = max(256, 1 << (end - 1).bit_length())
            table = self._tables[key] = self._table(kind, size, positions.device, dtype)
        swap = self._swaps.get(key[:2])
        if swap is None:
            half = self._rotated(kind) // 2
            index = list(range(self.config.head_dim))
            swap = torch.tensor(index[half : 2 * half] + index[:half] + index[2 * half :], device=positions.device)
            self._swaps[key[:2]] = swap
        cos, sin = table
        return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2), swap

    def _rotated(self, kind: str) -> int:
        return int(self.config.head_dim * self.config.rope_parameters[kind].partial_rotary_factor)

    def _table(self, kind: str, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rotated = self._rotated(kind)
        theta = self.config.rope_parameters[kind].rope_theta
        frequency = 1.0 / (theta ** (torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated))
        angle = torch.arange(size, dtype=torch.float32, device=device)[:, None] * frequency
        rest = torch.zeros(size, self.config.head_dim - rotated, device=device)
        cos = torch.cat([angle.cos(), angle.cos(), rest + 1], dim=-1)
        sin = torch.cat([-angle.sin(), angle.sin(), rest], dim=-1)
        return cos.to(dtype), sin.to(dtype)
