"""Inputs of block attention: sequences of different lengths, one of them empty, behind a random cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.kernels.problem import Problem
from runtime.layout import Layout, causal, draft, single_forward


def inputs(problem: Problem, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """The first sequence has `problem.context` cached tokens, the last of several none."""
    config, batch, slots = problem.config, problem.batch, problem.slots
    generator = None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    layout = _layout(problem)
    cache = (batch + 1, problem.context + slots + 3, config.num_key_value_heads, config.head_dim)
    lengths = [problem.context * (batch - 1 - b) // max(1, batch - 1) for b in range(batch)] if batch > 1 else None
    return {
        "query": noise(batch * slots, config.num_attention_heads, config.head_dim),
        "keys": noise(*cache),
        "values": noise(*cache),
        "lengths": torch.tensor(lengths or [problem.context], dtype=torch.int32).to(device),
        "slots": slots,
        "visible": None if layout.visible is None else layout.visible.to(torch.int8).to(device),
        "offsets": layout.offsets.to(torch.int32).to(device),
        "window": problem.window,
    }


def _layout(problem: Problem) -> Layout:
    if problem.kind == "draft":
        return draft(problem.slots - 1)
    if problem.kind == "single":
        return single_forward(problem.slots // (1 + len(problem.levels)) - 1, problem.levels)
    return causal(problem.slots)
