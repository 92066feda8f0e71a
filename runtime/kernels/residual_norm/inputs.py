"""Arguments to try the embedding and the norm on."""

from __future__ import annotations

from typing import Any

import torch

from runtime.kernels.problem import Problem

outputs = ("residual", "normed")
outputs_embed = ("residual",)


def inputs_embed(problem: Problem, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Random tokens, a table, and a bias and scale per channel."""
    config, random = problem.config, _generator(device, seed)
    vocabulary, hidden = config.vocab_size, config.hidden_size
    return {
        "tokens": torch.randint(vocabulary, (problem.tokens,), generator=random, device=device),
        "table": torch.randn(vocabulary, hidden, generator=random, device=device, dtype=dtype),
        "bias": torch.randn(hidden, generator=random, device=device, dtype=dtype) / 4,
        "scale": torch.randn(hidden, generator=random, device=device, dtype=dtype) / 4 + 1,
    }


def inputs(problem: Problem, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """A branch, a residual that is larger than it, as deep in a model, and noise in every scale."""
    rows, hidden, random = problem.tokens, problem.config.hidden_size, _generator(device, seed)

    def channels(mean: float) -> torch.Tensor:
        return torch.randn(hidden, generator=random, device=device) / 4 + mean

    return {
        "branch": torch.randn(rows, hidden, generator=random, device=device, dtype=dtype),
        "residual": 3 * torch.randn(rows, hidden, generator=random, device=device),
        "scaling": (channels(0), channels(1), channels(1)),
        "weight": channels(1).to(dtype),
        "eps": problem.config.rms_norm_eps,
    }


def _generator(device: torch.device | str, seed: int) -> torch.Generator | None:
    """None where nothing is drawn."""
    return None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)
