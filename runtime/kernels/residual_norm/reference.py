"""What stands between the branches of a layer, in plain torch: the embedding, residual scaling and the norm."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Scaling: TypeAlias = tuple[Tensor, Tensor, Tensor]  # `ResidualScaling.derive`: constant, branch and residual scale


def embed(tokens: Tensor, table: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """Tokens int64 [N], table [V, H], bias and scale [H] -> the first residual, fp32 [N, H]."""
    return ((table.index_select(0, tokens) + bias) * scale).float()


def residual_norm(
    branch: Tensor | None, residual: Tensor, scaling: Scaling | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a branch [N, H] to the residual fp32 [N, H] and norm the sum: both [N, H], the norm in the weight's type.

    scaling: fp32 [H] each. Without a branch (and without scaling) the residual is normed as it is.
    The residual given may be overwritten: use the one returned.
    """
    if branch is not None and scaling is not None:
        constant, branch_scale, residual_scale = scaling
        residual = torch.addcmul(torch.addcmul(constant, branch.float(), branch_scale), residual, residual_scale)
    x = residual.to(weight.dtype)  # rounded before the norm, which is computed in fp32, as `RMSNorm` does
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = (norm * norm * (1 / x.shape[-1]) + eps).rsqrt()
    return residual, (x.float() * inverse).to(weight.dtype) * weight
