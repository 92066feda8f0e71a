"""The whole router of a layer in one launch.

The down-projection holds most of the weights, so its rows and columns are spread over many blocks, which leave partial
sums. The last block to arrive at a tile of tokens adds them up and does the rest for that tile: state, norm, MLP,
softmax and the choice. No block ever waits for another, so nothing can lock up, at any number of blocks.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.launch import launch
from runtime.kernels.target import Tiling
from runtime.model.moe import RouterWeights

_MAX_TILES = 65_536  # of tokens in one launch
_SECTOR = 16  # elements: what a GPU reads from its memory at least, at 2 bytes each


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _choose(
    rows,
    here,
    state,
    down_bias,
    state_scale,
    norm,
    norm_eps,
    fc1,
    fc1_bias,
    fc2,
    fc2_bias,
    out,
    balancing,
    active,
    partial,
    chosen,
    probability,
    next_state,
    tokens,
    R: tl.constexpr,
    CLASSES: tl.constexpr,
    PAD_R: tl.constexpr,
    PAD_CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Everything behind the down-projection, for BLOCK_M tokens."""
    dtype = fc1.dtype.element_ty
    r = tl.arange(0, PAD_R)
    c = tl.arange(0, PAD_CLASSES)
    column, real = r < R, c < CLASSES
    inside = here[:, None] & column[None, :]
    where = rows[:, None] * R + r[None, :]
    # What does not depend on the sums is asked for first: this block is alone, so it is the latency that counts.
    last = tl.load(out + c[None, :] * R + r[:, None], mask=column[:, None] & real[None, :], other=0.0)
    bias2 = tl.load(fc2_bias + r, mask=column, other=0.0).to(tl.float32)
    scale = tl.load(norm + r, mask=column, other=0.0).to(tl.float32)
    own = tl.load(down_bias + r, mask=column, other=0.0).to(tl.float32)[None, :]
    for s in tl.static_range(SPLIT):
        own += tl.load(partial + s * tokens * R + where, mask=inside, other=0.0, cache_modifier=".cg")
    own = _rounded(own, dtype)
    if state is not None:
        taken = tl.load(state_scale + r, mask=column, other=0.0).to(tl.float32)
        own += tl.load(state + where, mask=inside, other=0.0).to(tl.float32) * taken[None, :]
        own = _rounded(own, dtype)
    tl.store(next_state + where, own.to(dtype), mask=inside)
    inverse = tl.rsqrt(tl.sum(own * own, axis=1) / R + tl.load(norm_eps))
    x = (_rounded(own * inverse[:, None], dtype) * scale[None, :]).to(dtype)
    # Both layers at once: a piece of the first layer's outputs is a piece of the second one's inputs.
    second = tl.zeros((BLOCK_M, PAD_R), dtype=tl.float32)
    for i in range((R + BLOCK_N - 1) // BLOCK_N):
        n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = n < R
        weight = tl.load(fc1 + n[None, :] * R + r[:, None], mask=column[:, None] & valid[None, :], other=0.0)
        bias1 = tl.load(fc1_bias + n, mask=valid, other=0.0).to(tl.float32)
        inner = tl.dot(x, weight, input_precision="ieee") + bias1[None, :]
        inner = _gelu(_rounded(inner, dtype)).to(dtype)
        weight = tl.load(fc2 + r[None, :] * R + n[:, None], mask=valid[:, None] & column[None, :], other=0.0)
        second = tl.dot(inner, weight, second, input_precision="ieee")
    inner = _gelu(_rounded(second + bias2[None, :], dtype)).to(dtype)
    logits = _rounded(tl.dot(inner, last, input_precision="ieee"), dtype)
    logits = tl.where(real[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    share = _rounded(weights / tl.sum(weights, axis=1)[:, None], dtype)
    score = share + tl.load(balancing + c, mask=real, other=0.0).to(tl.float32)[None, :]
    score = tl.where(score == score, score, float("inf"))  # as torch: the first NaN, else the first of the largest
    score = tl.where(real[None, :], score, float("-inf"))
    best = tl.argmax(score, axis=1)
    tl.store(probability + rows, tl.sum(tl.where(c[None, :] == best[:, None], share, 0.0), axis=1).to(dtype), mask=here)
    if active is not None:
        best = tl.where(rows < tl.load(active), best, CLASSES - 1)
    tl.store(chosen + rows, best.to(tl.int32), mask=here)


@triton.jit
def _router(
    x,
    state,
    down,
    down_bias,
    state_scale,
    norm,
    norm_eps,
    fc1,
    fc1_bias,
    fc2,
    fc2_bias,
    out,
    balancing,
    active,
    partial,
    arrived,
    chosen,
    probability,
    next_state,
    tokens,
    H: tl.constexpr,
    R: tl.constexpr,
    CLASSES: tl.constexpr,
    PAD_R: tl.constexpr,
    PAD_CLASSES: tl.constexpr,
    PIECES: tl.constexpr,
    STEPS: tl.constexpr,
    TOUCH: tl.constexpr,
    SECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    RELEASE: tl.constexpr,
):
    tile, piece, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < tokens
    # Bring the MLP's weights, which one block will read, from the memory to the cache that all blocks share.
    touched = ((piece * SPLIT + split) * TOUCH + tl.arange(0, TOUCH)) * SECTOR
    first = (touched < R * R) & (tile == 0)
    warm = tl.load(fc1 + touched, mask=first, other=0.0) + tl.load(fc2 + touched, mask=first, other=0.0)

    r = piece * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for i in range(STEPS):
        k = (split * STEPS + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        tokens_in = tl.load(x + rows[:, None] * H + k[None, :], mask=here[:, None] & (k < H)[None, :], other=0.0)
        weight = tl.load(down + r[None, :] * H + k[:, None], mask=(r < R)[None, :] & (k < H)[:, None], other=0.0)
        sums = tl.dot(tokens_in, weight, sums, input_precision="ieee")
    where = partial + split * tokens * R + rows[:, None] * R + r[None, :]
    inside = here[:, None] & (r < R)[None, :]
    tl.store(where, sums, mask=inside, cache_modifier=".cg")
    if RELEASE:  # adds nothing: every wave waits until its own stores are where other blocks see them
        tl.atomic_add(where, tl.zeros_like(sums), mask=inside, sem="release", scope="gpu")
    tl.debug_barrier()  # all threads have stored before one of them reports it
    before = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
    tl.store(partial + touched, warm.to(tl.float32), mask=before < 0)  # never: only so that the loads are kept
    if before == PIECES * SPLIT - 1:
        tl.store(arrived + tile, 0)  # for the next launch
        _choose(
            rows,
            here,
            state,
            down_bias,
            state_scale,
            norm,
            norm_eps,
            fc1,
            fc1_bias,
            fc2,
            fc2_bias,
            out,
            balancing,
            active,
            partial,
            chosen,
            probability,
            next_state,
            tokens,
            R,
            CLASSES,
            PAD_R,
            PAD_CLASSES,
            BLOCK_M,
            BLOCK_N,
            SPLIT,
        )


@cache
def _arrived(device: torch.device) -> Tensor:
    """How many blocks have arrived at each tile: zero between launches, as the last block sets it back.

    One for all launches on a device, which therefore must follow each other on one stream. Kept for the life of the
    process, because captured graphs hold its address.
    """
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def router(
    x: Tensor, state: Tensor | None, weights: RouterWeights, active: Tensor | None, *, tiling: Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.router`. One stream per device; the first call on a device must not be captured in a graph.

    In fp32, whose pieces of the MLP would exceed the shared memory, tiles have 16 tokens and 16 columns.
    """
    if x.dtype == torch.float32:
        tiling = {**tiling, "BLOCK_M": 16, "BLOCK_N": 16}
    (tokens, hidden), (classes, width) = x.shape, weights.out.shape
    tiles = triton.cdiv(tokens, tiling["BLOCK_M"])
    pieces = triton.cdiv(width, tiling["BLOCK_R"])
    assert tiles <= _MAX_TILES
    chosen = torch.empty(tokens, dtype=torch.int32, device=x.device)
    probability = torch.empty(tokens, dtype=x.dtype, device=x.device)
    next_state = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    arguments = {
        "x": x,
        "state": state,
        **weights._asdict(),
        "active": active,
        "partial": torch.empty(tiling["SPLIT"], tokens, width, dtype=torch.float32, device=x.device),
        "arrived": _arrived(x.device),
        "chosen": chosen,
        "probability": probability,
        "next_state": next_state,
        "tokens": tokens,
    }
    constants = {
        "H": hidden,
        "R": width,
        "CLASSES": classes,
        "PAD_R": max(triton.next_power_of_2(width), 16),
        "PAD_CLASSES": max(triton.next_power_of_2(classes), 16),
        "PIECES": pieces,
        "STEPS": triton.cdiv(hidden, tiling["BLOCK_K"] * tiling["SPLIT"]),
        "TOUCH": triton.next_power_of_2(triton.cdiv(width * width, _SECTOR * pieces * tiling["SPLIT"])),
        "SECTOR": _SECTOR,
    }
    launch(_router, (tiles, pieces, tiling["SPLIT"]), arguments, constants, tiling)
    return chosen, probability, next_state
