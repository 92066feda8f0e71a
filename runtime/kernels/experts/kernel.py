"""The experts on a GPU: gate, up and SiLU in one launch, down in a second; only the weights of experts hit are read.

A *block* is up to BLOCK_M tokens of one expert (the skip expert counts as one more). The host starts as many as any
routing can need; those beyond the real number return at once, so that no value is read on the host. With few tokens
every program finds its block's expert and rows itself; with many, a launch of its own does so once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.launch import launch
from runtime.kernels.target import AMD_OPTIONS, OPTIONS, Tiling

_INLINE = 8192  # most cells of the tables by which a program finds its own rows: 64 registers of each of 128 threads


@triton.jit
def _counts(chosen, tokens, start, CLASSES: tl.constexpr, CHUNK: tl.constexpr):
    """How many of CHUNK tokens from `start` chose each class: int32 [CLASSES]."""
    token = start + tl.arange(0, CHUNK)
    choice = tl.load(chosen + token, mask=token < tokens, other=-1)
    return tl.sum((choice[None, :] == tl.arange(0, CLASSES)[:, None]).to(tl.int32), 1)


@triton.jit
def _locate(count, block, CLASSES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a block (at least CLASSES: there is no such block), and the rank of its first token in it."""
    blocks = (count + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, CLASSES) < expert, blocks, 0), 0)
    return expert, (block - before) * BLOCK_M


@triton.jit
def align_kernel(
    chosen,
    tokens,
    block_expert,
    block_rows,
    CLASSES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write one block's expert, and its tokens as rows of [blocks, BLOCK_M], -1 behind the last."""
    block = tl.program_id(0)
    count = tl.zeros([CLASSES], tl.int32)
    for chunk in range(CHUNKS):
        count += _counts(chosen, tokens, chunk * CHUNK, CLASSES, CHUNK)
    expert, first = _locate(count, block, CLASSES, BLOCK_M)
    tl.store(block_expert + block, expert)
    slot = tl.arange(0, BLOCK_M)
    own = tl.sum(tl.where(tl.arange(0, CLASSES) == expert, count, 0), 0)
    tl.store(block_rows + block * BLOCK_M + slot, tl.full([BLOCK_M], -1, tl.int32), mask=first + slot >= own)
    seen = -first
    for chunk in range(CHUNKS):
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        hit = tl.load(chosen + token, mask=token < tokens, other=-1) == expert
        rank = seen + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(block_rows + block * BLOCK_M + rank, token, mask=hit & (rank >= 0) & (rank < BLOCK_M))
        seen += tl.sum(hit.to(tl.int32), 0)


@triton.jit
def _block(
    chosen,
    tokens,
    block_expert,
    block_rows,
    block,
    CLASSES: tl.constexpr,
    TOKENS: tl.constexpr,
    INLINE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block's expert and its tokens [BLOCK_M], -1 behind the last."""
    slot = tl.arange(0, BLOCK_M)
    if INLINE:
        expert, first = _locate(_counts(chosen, tokens, 0, CLASSES, TOKENS), block, CLASSES, BLOCK_M)
        token = tl.arange(0, TOKENS)
        hit = tl.load(chosen + token, mask=token < tokens, other=-1) == expert
        rank = tl.cumsum(hit.to(tl.int32), 0) - 1 - first
        row = tl.max(tl.where(hit[None, :] & (rank[None, :] == slot[:, None]), token[None, :], -1), 1)
    else:
        expert = tl.load(block_expert + block)
        row = tl.load(block_rows + block * BLOCK_M + slot)
    return expert, row


@triton.jit
def _place(BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's block and column: GROUP_M blocks pass a column together, so that L2 serves its weights to all."""
    program = tl.program_id(0)
    first = program // (GROUP_M * COLUMNS) * GROUP_M
    size = tl.minimum(BLOCKS - first, GROUP_M)
    inside = program % (GROUP_M * COLUMNS)
    return first + inside % size, inside // size


@triton.jit
def _silu_product(gate, up, dtype: tl.constexpr):
    """SiLU(gate) * up of fp32 accumulators, rounded where separate operators would round."""
    gate = gate.to(dtype).to(tl.float32)
    active = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (active * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def gate_up_kernel(
    x,
    chosen,
    tokens,
    block_expert,
    block_rows,
    gate_up,
    hidden,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    CLASSES: tl.constexpr,
    TOKENS: tl.constexpr,
    INLINE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
):
    """hidden[row] = SiLU(gate x[row]) * up x[row] for a block's rows and BLOCK_N columns."""
    block, column = _place(BLOCKS, (WIDTH + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert, row = _block(chosen, tokens, block_expert, block_rows, block, CLASSES, TOKENS, INLINE, BLOCK_M)
    if expert >= EXPERTS:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + tl.maximum(row, 0)[:, None] * HIDDEN + k[None, :]
    gate_at = gate_up + expert.to(tl.int64) * (2 * WIDTH * HIDDEN)
    gate_at += tl.minimum(n, WIDTH - 1)[:, None] * HIDDEN + k[None, :]
    if SWAP:
        gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = gate
    for start in range(0, HIDDEN, BLOCK_K):
        if HIDDEN % BLOCK_K == 0:
            rows = tl.load(x_at + start, mask=row[:, None] >= 0, other=0.0)
            gates = tl.load(gate_at + start)
            ups = tl.load(gate_at + WIDTH * HIDDEN + start)
        else:
            inside = start + k[None, :] < HIDDEN
            rows = tl.load(x_at + start, mask=(row[:, None] >= 0) & inside, other=0.0)
            gates = tl.load(gate_at + start, mask=inside, other=0.0)
            ups = tl.load(gate_at + WIDTH * HIDDEN + start, mask=inside, other=0.0)
        if SWAP:
            gate = tl.dot(gates, tl.trans(rows), gate, input_precision="ieee")
            up = tl.dot(ups, tl.trans(rows), up, input_precision="ieee")
        else:
            gate = tl.dot(rows, tl.trans(gates), gate, input_precision="ieee")
            up = tl.dot(rows, tl.trans(ups), up, input_precision="ieee")
    out = _silu_product(gate, up, hidden.dtype.element_ty)
    if SWAP:
        out = tl.trans(out)
    tl.store(hidden + row[:, None] * WIDTH + n[None, :], out, mask=(row[:, None] >= 0) & (n[None, :] < WIDTH))


@triton.jit
def down_kernel(
    hidden,
    chosen,
    tokens,
    block_expert,
    block_rows,
    probability,
    down,
    out,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    CLASSES: tl.constexpr,
    TOKENS: tl.constexpr,
    INLINE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
):
    """out[row] = probability[row] * down hidden[row] for a block's rows and BLOCK_N columns; the skip expert's: 0."""
    block, column = _place(BLOCKS, (HIDDEN + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert, row = _block(chosen, tokens, block_expert, block_rows, block, CLASSES, TOKENS, INLINE, BLOCK_M)
    if expert > EXPERTS:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    out_at = out + row[:, None] * HIDDEN + n[None, :]
    kept = (row[:, None] >= 0) & (n[None, :] < HIDDEN)
    if expert == EXPERTS:
        tl.store(out_at, tl.zeros([BLOCK_M, BLOCK_N], out.dtype.element_ty), mask=kept)
        return
    k = tl.arange(0, BLOCK_K)
    hidden_at = hidden + tl.maximum(row, 0)[:, None] * WIDTH + k[None, :]
    down_at = down + expert.to(tl.int64) * (WIDTH * HIDDEN) + tl.minimum(n, HIDDEN - 1)[:, None] * WIDTH + k[None, :]
    if SWAP:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            rows = tl.load(hidden_at + start, mask=row[:, None] >= 0, other=0.0)
            weights = tl.load(down_at + start)
        else:
            inside = start + k[None, :] < WIDTH
            rows = tl.load(hidden_at + start, mask=(row[:, None] >= 0) & inside, other=0.0)
            weights = tl.load(down_at + start, mask=inside, other=0.0)
        if SWAP:
            total = tl.dot(weights, tl.trans(rows), total, input_precision="ieee")
        else:
            total = tl.dot(rows, tl.trans(weights), total, input_precision="ieee")
    result = total.to(out.dtype.element_ty)
    if SWAP:
        result = tl.trans(result)
    share = tl.load(probability + tl.maximum(row, 0)).to(tl.float32)
    tl.store(out_at, (result.to(tl.float32) * share[:, None]).to(out.dtype.element_ty), mask=kept)


@triton.jit
def gate_up_vector_kernel(
    x,
    chosen,
    gate_up,
    hidden,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`gate_up_kernel` for one token, without matrix cores: few rows, so that all their loads are in flight at once."""
    token = tl.program_id(0)
    expert = tl.load(chosen + token)
    if expert >= EXPERTS:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    gate_at = gate_up + expert.to(tl.int64) * (2 * WIDTH * HIDDEN)
    gate_at += tl.minimum(n, WIDTH - 1)[:, None] * HIDDEN + k[None, :]
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
        if HIDDEN % BLOCK_K == 0:
            values = tl.load(x + token * HIDDEN + start + k)
            gates = tl.load(gate_at + start)
            ups = tl.load(gate_at + WIDTH * HIDDEN + start)
        else:
            inside = start + k < HIDDEN
            values = tl.load(x + token * HIDDEN + start + k, mask=inside, other=0.0)
            gates = tl.load(gate_at + start, mask=inside[None, :], other=0.0)
            ups = tl.load(gate_at + WIDTH * HIDDEN + start, mask=inside[None, :], other=0.0)
        values = values.to(tl.float32)[None, :]
        gate += gates.to(tl.float32) * values
        up += ups.to(tl.float32) * values
    out = _silu_product(tl.sum(gate, 1), tl.sum(up, 1), hidden.dtype.element_ty)
    tl.store(hidden + token * WIDTH + n, out, mask=n < WIDTH)


@triton.jit
def down_vector_kernel(
    hidden,
    chosen,
    probability,
    down,
    out,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`down_kernel` for one token, without matrix cores."""
    token = tl.program_id(0)
    expert = tl.load(chosen + token)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if expert >= EXPERTS:
        tl.store(out + token * HIDDEN + n, tl.zeros([BLOCK_N], out.dtype.element_ty), mask=n < HIDDEN)
        return
    k = tl.arange(0, BLOCK_K)
    down_at = down + expert.to(tl.int64) * (WIDTH * HIDDEN) + tl.minimum(n, HIDDEN - 1)[:, None] * WIDTH + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
        if WIDTH % BLOCK_K == 0:
            values = tl.load(hidden + token * WIDTH + start + k)
            weights = tl.load(down_at + start)
        else:
            inside = start + k < WIDTH
            values = tl.load(hidden + token * WIDTH + start + k, mask=inside, other=0.0)
            weights = tl.load(down_at + start, mask=inside[None, :], other=0.0)
        total += weights.to(tl.float32) * values.to(tl.float32)[None, :]
    result = tl.sum(total, 1).to(out.dtype.element_ty).to(tl.float32)
    share = tl.load(probability + token).to(tl.float32)
    tl.store(out + token * HIDDEN + n, (result * share).to(out.dtype.element_ty), mask=n < HIDDEN)


def _power(value: int) -> int:
    """The smallest power of two that is not below the value."""
    return 1 << (value - 1).bit_length()


def experts(x: Tensor, chosen: Tensor, probability: Tensor, gate_up: Tensor, down: Tensor, *, tiling: Tiling) -> Tensor:
    """The chosen expert of every token, times its probability; rows of the skip expert (number E) are zero.

    x [N, H], chosen int32 [N], probability [N], gate_up [E, 2I, H], down [E, H, I], all contiguous -> [N, H].
    tiling: BLOCK_M tokens of a block (1: no matrix cores, a block per token), BLOCK_N columns of gate and of up and
    BLOCK_K of their inner dimension at once, DOWN_N and DOWN_K the same of down, GROUP_M blocks that share weights in
    L2, SWAP 1: the weights are the left operand, whose tile may be wider than the tokens'. BLOCK_K and DOWN_K count
    2-byte elements: fp32 takes half as many, which is as much memory.
    """
    tokens, size = x.shape
    count, _, width = down.shape
    hidden = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)
    shape = {"HIDDEN": size, "WIDTH": width, "EXPERTS": count}
    options = {name: value for name, value in tiling.items() if name in OPTIONS + AMD_OPTIONS}
    block_m, smaller = tiling["BLOCK_M"], x.element_size() // 2
    tile = {"BLOCK_N": tiling["BLOCK_N"], "BLOCK_K": tiling["BLOCK_K"] // smaller, **options}
    down_tile = {"BLOCK_N": tiling["DOWN_N"], "BLOCK_K": tiling["DOWN_K"] // smaller, **options}
    columns, down_columns = triton.cdiv(width, tile["BLOCK_N"]), triton.cdiv(size, down_tile["BLOCK_N"])
    if block_m == 1:
        shape["STAGES"] = options["num_stages"]  # loads of a loop without matrix products are staged on demand only
        given = {"x": x, "chosen": chosen, "gate_up": gate_up, "hidden": hidden}
        launch(gate_up_vector_kernel, (tokens, columns), given, shape, tile)
        given = {"hidden": hidden, "chosen": chosen, "probability": probability, "down": down, "out": out}
        launch(down_vector_kernel, (tokens, down_columns), given, shape, down_tile)
        return out
    classes, padded = _power(count + 1), _power(tokens)
    inline = padded * max(block_m, classes) <= _INLINE
    hit = min(tokens, count + 1)  # so many classes with one token each, and every further block full: the most blocks
    blocks = hit + (tokens - hit) // block_m
    block_expert, block_rows = None, None
    if not inline:
        block_expert = torch.empty(blocks, dtype=torch.int32, device=x.device)
        block_rows = torch.empty((blocks, block_m), dtype=torch.int32, device=x.device)
        chunk = min(padded, _INLINE // classes)
        given = {"chosen": chosen, "tokens": tokens, "block_expert": block_expert, "block_rows": block_rows}
        chunks = {"CLASSES": classes, "CHUNKS": triton.cdiv(tokens, chunk), "CHUNK": chunk}
        launch(align_kernel, (blocks,), given, chunks, {"BLOCK_M": block_m, "num_warps": 4})
    where = {"chosen": chosen, "tokens": tokens, "block_expert": block_expert, "block_rows": block_rows}
    shape |= {"CLASSES": classes, "TOKENS": padded if inline else 1, "INLINE": inline, "BLOCKS": blocks}
    shared = {"BLOCK_M": block_m, "GROUP_M": tiling["GROUP_M"], "SWAP": tiling["SWAP"]}
    given = {"x": x, **where, "gate_up": gate_up, "hidden": hidden}
    launch(gate_up_kernel, (blocks * columns,), given, shape, tile | shared)
    given = {"hidden": hidden, **where, "probability": probability, "down": down, "out": out}
    launch(down_kernel, (blocks * down_columns,), given, shape, down_tile | shared)
    return out
