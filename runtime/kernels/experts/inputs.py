"""Arguments of the experts: random weights, and tokens spread over all experts and the skip expert."""

from __future__ import annotations

from typing import Any

import torch

from runtime.kernels.problem import Problem


def inputs(problem: Problem, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """x [N, H], chosen int32 [N], probability [N], gate_up [E, 2I, H], down [E, H, I]; outputs are about 0.3 each.

    The first token never skips, so that one token alone is work. On the device "meta": shapes and dtypes only.
    """
    config, tokens = problem.config, problem.tokens
    count, size, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    meta = torch.device(device).type == "meta"
    generator = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(scale)

    chosen = torch.randint(0, count + 1, (tokens,), dtype=torch.int32, device=device, generator=generator)
    chosen[0] = tokens % count
    return {
        "x": normal(tokens, size),
        "chosen": chosen,
        "probability": torch.rand(tokens, dtype=dtype, device=device, generator=generator),
        "gate_up": normal(count, 2 * width, size, scale=size**-0.5),
        "down": normal(count, size, width, scale=width**-0.5),
    }
