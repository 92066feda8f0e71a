"""The experts in the structure of the fused-MoE Triton kernel that vLLM and SGLang launch, tiled by its parameters.

Tokens are sorted by expert and padded to blocks of BLOCK_SIZE_M; one grouped product makes gate and up, SiLU and the
product with up are a launch of their own, a second grouped product makes down and multiplies the routing probability.
Both products have the same tile, which is what a line of those engines' tile files sets; our own `experts`, whose two
launches have a tile each, cannot stand in for it when such a file is measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.experts.kernel import align_kernel
from runtime.kernels.launch import launch
from runtime.kernels.target import AMD_OPTIONS, OPTIONS, Tiling

_CHUNK = 512  # tokens whose choices a program of the sorting launch holds at once
_ACTIVATED = 1024  # columns of a program of the activation


@triton.jit(do_not_specialize=["blocks"])  # so that one compiled program serves every routing of every token count
def product_kernel(
    rows,
    weights,
    out,
    probability,
    block_expert,
    block_rows,
    blocks,
    N: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
):
    """out[row] = weights[expert] rows[row] for a block's rows and BLOCK_SIZE_N of N columns.

    WEIGHTED: times probability[row]; and rows of the skip expert are written as zeros, which otherwise nobody reads.
    GROUP_SIZE_M blocks pass a column together, so that L2 serves its weights to all of them.
    """
    program = tl.program_id(0)
    columns: tl.constexpr = (N + BLOCK_SIZE_N - 1) // BLOCK_SIZE_N
    first = program // (GROUP_SIZE_M * columns) * GROUP_SIZE_M
    together = tl.minimum(blocks - first, GROUP_SIZE_M)
    inside = program % (GROUP_SIZE_M * columns)
    block, column = first + inside % together, inside // together
    expert = tl.load(block_expert + block)
    if expert > EXPERTS:
        return
    row = tl.load(block_rows + block * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M))
    n = column * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    out_at = out + row.to(tl.int64)[:, None] * N + n[None, :]
    kept = (row[:, None] >= 0) & (n[None, :] < N)
    if expert == EXPERTS:
        if WEIGHTED:
            tl.store(out_at, tl.zeros([BLOCK_SIZE_M, BLOCK_SIZE_N], out.dtype.element_ty), mask=kept)
        return
    k = tl.arange(0, BLOCK_SIZE_K)
    rows_at = rows + tl.maximum(row, 0).to(tl.int64)[:, None] * K + k[None, :]
    weights_at = weights + expert.to(tl.int64) * (N * K) + tl.minimum(n, N - 1)[None, :] * K + k[:, None]
    total = tl.zeros([BLOCK_SIZE_M, BLOCK_SIZE_N], tl.float32)
    for start in range(0, K, BLOCK_SIZE_K):
        if K % BLOCK_SIZE_K == 0:
            left = tl.load(rows_at + start, mask=row[:, None] >= 0, other=0.0)
            right = tl.load(weights_at + start)
        else:
            left = tl.load(rows_at + start, mask=(row[:, None] >= 0) & (start + k[None, :] < K), other=0.0)
            right = tl.load(weights_at + start, mask=start + k[:, None] < K, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    if WEIGHTED:
        total *= tl.load(probability + tl.maximum(row, 0)).to(tl.float32)[:, None]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def activation_kernel(both, chosen, hidden, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """hidden[token] = SiLU(gate) * up of both[token] = gate | up; what the skip expert's tokens hold nobody reads."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(chosen + token) >= EXPERTS:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_at = both + token * (2 * WIDTH) + column
    gate = tl.load(gate_at, mask=column < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(gate_at + WIDTH, mask=column < WIDTH, other=0.0).to(tl.float32)
    active = (gate / (1 + tl.exp(-gate))).to(hidden.dtype.element_ty).to(tl.float32)
    tl.store(hidden + token * WIDTH + column, (active * up).to(hidden.dtype.element_ty), mask=column < WIDTH)


def _power(value: int) -> int:
    """The smallest power of two that is not below the value."""
    return 1 << (value - 1).bit_length()


def grouped_experts(
    x: Tensor, chosen: Tensor, probability: Tensor, gate_up: Tensor, down: Tensor, *, tiling: Tiling
) -> Tensor:
    """The chosen expert of every token, times its probability; rows of the skip expert (number E) are zero.

    x [N, H], chosen int32 [N], probability [N], gate_up [E, 2I, H], down [E, H, I], all contiguous -> [N, H].
    tiling: BLOCK_SIZE_M tokens of a block, BLOCK_SIZE_N columns and BLOCK_SIZE_K of the inner dimension at once, of
    both products; GROUP_SIZE_M blocks that share weights in L2. BLOCK_SIZE_K counts 2-byte elements, the only ones for
    which the engines' files of unquantised experts are written: fp32 takes half as many.
    """
    tokens, (count, _, width) = x.shape[0], down.shape
    block_m, chunk = tiling["BLOCK_SIZE_M"], min(_power(tokens), _CHUNK)
    hit = min(tokens, count + 1)  # so many classes with one token each, and every further block full: the most blocks
    blocks = hit + (tokens - hit) // block_m
    block_expert = torch.empty(blocks, dtype=torch.int32, device=x.device)
    block_rows = torch.empty((blocks, block_m), dtype=torch.int32, device=x.device)
    both = torch.empty((tokens, 2 * width), dtype=x.dtype, device=x.device)
    hidden = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)

    where = {"block_expert": block_expert, "block_rows": block_rows}
    shape = {"CLASSES": _power(count + 1), "CHUNKS": triton.cdiv(tokens, chunk), "CHUNK": chunk}
    given = {"chosen": chosen, "tokens": tokens, **where}
    launch(align_kernel, (blocks,), given, shape, {"BLOCK_M": block_m, "num_warps": 4})

    options = {name: value for name, value in tiling.items() if name in OPTIONS + AMD_OPTIONS}
    tile = {name: tiling[name] for name in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "GROUP_SIZE_M")}
    tile |= {"BLOCK_SIZE_K": tiling["BLOCK_SIZE_K"] * 2 // x.element_size(), **options}

    def product(rows: Tensor, weights: Tensor, result: Tensor, weighted: bool) -> None:
        n, k = weights.shape[1:]
        given = {"rows": rows, "weights": weights, "out": result, "probability": probability, **where}
        shape = {"N": n, "K": k, "EXPERTS": count, "WEIGHTED": weighted}
        grid = (blocks * triton.cdiv(n, tile["BLOCK_SIZE_N"]),)
        launch(product_kernel, grid, {**given, "blocks": blocks}, shape, tile)

    product(x, gate_up, both, False)
    block = min(_power(width), _ACTIVATED)
    given, shape = {"both": both, "chosen": chosen, "hidden": hidden}, {"WIDTH": width, "EXPERTS": count}
    launch(activation_kernel, (tokens, triton.cdiv(width, block)), given, shape, {"BLOCK": block, "num_warps": 4})
    product(hidden, down, out, True)
    return out
