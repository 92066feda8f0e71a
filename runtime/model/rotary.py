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
        self._tables: dict[tuple[str, torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def factors(
        self, kind: str, positions: slice | Tensor, end: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin [..., 1, head_dim] at `positions`, all below `end`; and the swap index [head_dim]."""
        key = (kind, dtype, device)
        table = self._tables.get(key)
        if table is None or table[0].shape[0] < end:
            with torch.inference_mode(False):  # kept for later calls, and a training one saves them for its backward
                table = self._tables[key] = self._table(kind, max(256, 1 << (end - 1).bit_length()), dtype, device)
        cos, sin, swap = table
        return cos[positions], sin[positions], swap

    def _table(self, kind: str, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        rope, width = self.config.rope_parameters[kind], self.config.head_dim
        rotated = int(width * rope.partial_rotary_factor)
        half = rotated // 2
        frequency = 1.0 / (rope.rope_theta ** (torch.arange(0, rotated, 2, device=device).float() / rotated))
        angle = torch.arange(size, device=device).float()[:, None] * frequency
        rest = torch.zeros(size, width - rotated, device=device)
        cos = torch.cat([angle.cos(), angle.cos(), rest + 1], dim=-1)
        sin = torch.cat([-angle.sin(), angle.sin(), rest], dim=-1)
        swap = torch.tensor([*range(half, rotated), *range(half), *range(rotated, width)], device=device)
        return cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1), swap
