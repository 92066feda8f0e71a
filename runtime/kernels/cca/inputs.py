"""Arguments of the CCA kernel for a problem: noise of the sizes that a model's have."""

from __future__ import annotations

from typing import Any

import torch

from runtime.kernels.cca.reference import CCAWeights
from runtime.kernels.problem import Problem
from runtime.layout import Layout, causal, draft, predecessors, single_forward
from runtime.model.rotary import Rotary

outputs = ("query",)


def layout_of(problem: Problem) -> Layout:
    """How the problem's slots lie."""
    if problem.kind == "draft":
        return draft(problem.slots - 1)
    if problem.kind == "single":
        return single_forward(problem.slots // (1 + len(problem.levels)) - 1, problem.levels)
    return causal(problem.slots)


def inputs(problem: Problem, dtype: torch.dtype, device: Any, seed: int = 0) -> dict[str, Any]:
    """The wrapper's arguments; lengths are ragged, the first sequence is empty if there are several."""
    config, batch, slots = problem.config, problem.batch, problem.slots
    layout, history, width = layout_of(problem), config.conv_history, config.head_dim
    heads, kv_heads = config.num_attention_heads + config.num_key_value_heads, config.num_key_value_heads
    column = config.query_size + config.kv_size + config.kv_size // 2
    capacity, ring = problem.context + slots, max(1, layout.committed) + history
    meta = torch.device(device).type == "meta"
    generator = None if meta else torch.Generator(device=device).manual_seed(seed)

    def noise(*shape: int, scale: float = 1.0, type: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul(scale).to(type)

    lengths = torch.full((batch,), problem.context, dtype=torch.int32, device=device)
    if batch > 1:
        lengths = (torch.arange(batch, device=device) * problem.context // (batch - 1)).to(torch.int32)
    previous = torch.arange(slots) - 1 if layout.previous is None else layout.previous
    cos, sin, swap = Rotary(config).factors(
        config.layer_types[0], slice(0, capacity + 1), capacity + 1, dtype, torch.device(device)
    )
    weights = CCAWeights(
        noise(heads, history + 1, width, width, scale=((history + 1) * width) ** -0.5),
        noise(heads, width, scale=0.2),
        1 + noise(kv_heads, scale=0.2, type=torch.float32),
    )
    return {
        "projected": noise(batch * slots, column + config.kv_size // 2),
        "weights": weights,
        "keys": noise(batch, capacity, kv_heads, width),
        "values": noise(batch, capacity, kv_heads, width),
        "columns": noise(batch, ring + 1, column),
        "lengths": lengths,
        "offsets": layout.offsets.to(device, torch.int32),
        "taps": predecessors(previous, history).to(device, torch.int32),
        "committed": layout.committed,
        "cos": cos[:, 0],
        "sin": sin[:, 0],
        "swap": swap,
    }
