"""The embedding, and residual scaling with the norm behind it: one launch each, a block for some whole rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.launch import launch
from runtime.kernels.residual_norm.reference import Scaling
from runtime.kernels.target import Tiling


@triton.jit
def _embed(tokens, table, bias, scale, residual, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    dtype = table.dtype.element_ty
    x = tl.load(table + tl.load(tokens + row) * H + column, mask=inside)
    x = (x.to(tl.float32) + tl.load(bias + column, mask=inside).to(tl.float32)).to(dtype)
    x = (x.to(tl.float32) * tl.load(scale + column, mask=inside).to(tl.float32)).to(dtype)
    tl.store(residual + row * H + column, x.to(tl.float32), mask=inside)


@triton.jit
def _residual_norm(
    branch,
    residual,
    constant,
    branch_scale,
    residual_scale,
    weight,
    normed,
    eps,
    rows,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < H
    dtype = weight.dtype.element_ty
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        shift = tl.load(constant + column, mask=inside, other=0.0)
        of_branch = tl.load(branch_scale + column, mask=inside, other=0.0)
        of_residual = tl.load(residual_scale + column, mask=inside, other=0.0)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        here = inside & (row < rows)
        x = tl.load(residual + row * H + column, mask=here, other=0.0)
        if branch is not None:
            added = tl.load(branch + row * H + column, mask=here, other=0.0).to(tl.float32)
            x = shift + added * of_branch + x * of_residual
            tl.store(residual + row * H + column, x, mask=here)
        x = x.to(dtype).to(tl.float32)  # every rounding of the eager norm
        inverse = tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
        tl.store(normed + row * H + column, ((x * inverse).to(dtype).to(tl.float32) * scale).to(dtype), mask=here)


def embed(tokens: Tensor, table: Tensor, bias: Tensor, scale: Tensor, *, tiling: Tiling) -> Tensor:
    """Tokens int64 [N], table [V, H], bias and scale [H] -> the first residual, fp32 [N, H]."""
    count, hidden = tokens.shape[0], table.shape[1]
    residual = torch.empty(count, hidden, dtype=torch.float32, device=table.device)
    arguments = {"tokens": tokens, "table": table, "bias": bias, "scale": scale, "residual": residual}
    launch(_embed, (count, triton.cdiv(hidden, tiling["BLOCK"])), arguments, {"H": hidden}, tiling)
    return residual


def residual_norm(
    branch: Tensor | None, residual: Tensor, scaling: Scaling | None, weight: Tensor, eps: float, *, tiling: Tiling
) -> tuple[Tensor, Tensor]:
    """`reference.residual_norm`; with a branch, the new residual overwrites the one given."""
    rows, hidden = residual.shape
    normed = torch.empty(rows, hidden, dtype=weight.dtype, device=weight.device)
    constant, branch_scale, residual_scale = (None, None, None) if scaling is None else scaling
    arguments = {
        "branch": branch,
        "residual": residual,
        "constant": constant,
        "branch_scale": branch_scale,
        "residual_scale": residual_scale,
        "weight": weight,
        "normed": normed,
        "eps": eps,
        "rows": rows,
    }
    constants = {"H": hidden, "BLOCK": triton.next_power_of_2(hidden)}
    launch(_residual_norm, (triton.cdiv(rows, tiling["ROWS"]),), arguments, constants, tiling)
    return residual, normed
