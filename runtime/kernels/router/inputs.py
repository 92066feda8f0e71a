"""Arguments to try the router on, and when another choice than the reference's is none worse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.problem import Problem
from runtime.kernels.router.reference import probabilities
from runtime.model.moe import RouterWeights

outputs = ("chosen", "probability", "state")


def inputs(problem: Problem, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Normed tokens, a state, weights under which experts differ clearly, and a last few tokens that are padding."""
    config, tokens, device = problem.config, problem.tokens, torch.device(device)
    hidden, width, classes = config.hidden_size, config.router_hidden_size, config.num_experts + 1
    random = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * std + mean).to(dtype)

    weights = RouterWeights(
        down=normal(width, hidden, std=hidden**-0.5),
        down_bias=normal(width, std=0.1),
        state_scale=normal(width, std=0.2, mean=0.8),
        norm=normal(width, std=0.2, mean=1.0),
        norm_eps=torch.full((), config.rms_norm_eps, device=device),
        fc1=normal(width, width, std=2 * width**-0.5),
        fc1_bias=normal(width, std=0.2),
        fc2=normal(width, width, std=2 * width**-0.5),
        fc2_bias=normal(width, std=0.2),
        out=normal(classes, width, std=2 * width**-0.5),
        balancing=normal(classes, std=0.05, dtype=torch.float32),
    )
    return {
        "x": normal(tokens, hidden),
        "state": normal(tokens, width),
        "weights": weights,
        "active": torch.full((1,), tokens - tokens // 4, dtype=torch.int32, device=device),
    }


def errors(arguments: dict[str, Any], expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> dict[str, float]:
    """chosen: the most that a choice falls short of the best score, which rounding may make so; inf for no class or
    padding that is not skipped. probability: against the reference's of the class found; padding has any."""
    x, state, weights, active = arguments["x"], arguments["state"], arguments["weights"], arguments["active"]
    shares = probabilities(x, state, weights)[0].float()
    real = torch.arange(x.shape[0], device=x.device) < (x.shape[0] if active is None else active)
    chosen, skip = found[0].long(), shares.shape[1] - 1
    if bool(((chosen < 0) | (chosen > skip)).any()) or bool((chosen[~real] != skip).any()):
        return {"chosen": math.inf}
    scores, index = shares + weights.balancing, chosen[:, None]
    short = (scores.amax(1) - scores.gather(1, index)[:, 0])[real]
    wanted = shares.gather(1, index)[:, 0][real]
    off = (found[1].float()[real] - wanted).norm() / wanted.norm()
    return {"chosen": float(short.max()), "probability": float(off)}
