"""Block attention with split keys: the slots of a sequence and the query heads of a KV head share one pass over K, V.

A tile's rows are (slot, query head) pairs of one sequence and KV head. Its keys are divided among up to `splits`
programs, each of which takes its share of the blocks that the sequence's length asks for; those left without keys end
at once. Where several have keys, each leaves its normalised output and the logarithm of its sum of exponentials, and
either the last one to arrive joins them (LAUNCHES 1) or a second kernel does (LAUNCHES 2). The former is for NVIDIA
alone: on AMD a barrier does not wait for what other waves store to global memory, so that being counted would not mean
being written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.config import require
from runtime.kernels.launch import launch
from runtime.kernels.target import Tiling

LOG2_E = 1.4426950408889634
SHARED_TILES = 4096  # the most row tiles whose keys are divided: a forward with more fills any device without that

_arrivals: dict[torch.device, Tensor] = {}


@triton.jit
def _place(slots, splits, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, XCDS: tl.constexpr):
    """Sequence, KV head, row tile and split of this program, and the number of its (sequence, KV head, row tile).

    The row tiles of one split are neighbours, so that all but the first read its keys from the L2 cache. AMD hands
    programs out to its XCDs in turn, and each has an L2 cache of its own: there, neighbours are XCDS apart.
    """
    program = tl.program_id(0)
    if XCDS > 1:
        each = tl.num_programs(0) // XCDS
        more = tl.num_programs(0) % XCDS  # so many XCDs run one program more
        program = program % XCDS * each + tl.minimum(program % XCDS, more) + program // XCDS
    tiles = tl.cdiv(slots * GROUP, BLOCK_M)
    pair = program // tiles // splits
    tile = program % tiles
    return pair // KV_HEADS, pair % KV_HEADS, tile, program // tiles % splits, pair * tiles + tile


@triton.jit
def _rows(
    sequence, kv_head, first, slots, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Slot of each row from the first on, whether there is such a row, and where its query and output lie."""
    row = first + tl.arange(0, ROWS)
    slot = row // GROUP
    head = kv_head * GROUP + row % GROUP
    return slot, slot < slots, ((sequence * slots + slot) * (KV_HEADS * GROUP) + head) * D


@triton.jit
def _share(
    length, slots, splits, offsets, slot, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The first block of keys that a row of the tile may see, the end of the last one, and the blocks of a split."""
    end = length + slots
    if CAUSAL:
        end = length + tl.minimum(tl.max(slot, axis=0) + 1, slots)
    first = 0
    if WINDOW > 0:
        offset = tl.load(offsets + tl.minimum(slot, slots - 1))
        first = tl.maximum(tl.minimum(tl.min(offset, axis=0) - WINDOW + 1, 0) + length, 0) // BLOCK_N
    last = tl.cdiv(end, BLOCK_N)
    return first, last, tl.maximum(tl.cdiv(last - first, splits), SPLIT_BLOCKS)


@triton.jit
def _attend_block(
    q, keys, values, block, end, length, slots, visible, offsets, slot, real, scale, best, total, acc,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys. Without MASKED they exist and every row sees them, unless a window hides them; then they are
    cached tokens."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    t = n - length  # the slot that a row of the cache holds, if any
    if MASKED:  # before the keys are loaded, so that the mask's many addresses are gone by then
        if visible is None:
            seen = t[None, :] <= slot[:, None]
        else:
            among = real[:, None] & (t >= 0)[None, :] & (t < slots)[None, :]
            seen = tl.load(visible + slot[:, None] * slots + t[None, :], mask=among, other=0) != 0
            seen = seen | (t < 0)[None, :]
    where = n[:, None] * STRIDE + d[None, :]
    if MASKED or BLOCK_D != D:
        loaded = (n < end)[:, None] & (d < D)[None, :]
        k = tl.load(keys + where, mask=loaded, other=0.0)
        v = tl.load(values + where, mask=loaded, other=0.0)
    else:
        k = tl.load(keys + where)
        v = tl.load(values + where)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    if WINDOW > 0:
        position = t  # relative to the length, like the offsets
        if MASKED:
            own = (t >= 0) & (t < slots)
            position = tl.where(own, tl.load(offsets + t, mask=own, other=0), t)
        reach = tl.load(offsets + slot, mask=real, other=0) - WINDOW
        scores = tl.where(position[None, :] > reach[:, None], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, axis=1))
    base = higher
    if MASKED or WINDOW > 0:
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
    p = tl.exp2(scores - base[:, None])
    decay = tl.exp2(best - base)
    total = total * decay + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _join(
    out, partial, sums, sequence, kv_head, tile, index, active, slots, splits, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weigh the outputs of a tile's active splits by their sums. ROWS: of a tile, rounded up to a power of two."""
    AT_ONCE: tl.constexpr = 32 // ROWS if ROWS < 32 else 1  # in flight: each split is a trip to the L2 cache
    d = tl.arange(0, BLOCK_D)
    _, real, where = _rows(sequence, kv_head, tile * BLOCK_M, slots, KV_HEADS, GROUP, D, ROWS)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for begin in range(0, active, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            there = real & (begin + i < active)
            row = (index * splits + begin + i) * BLOCK_M + tl.arange(0, ROWS)
            kept = there[:, None] & (d < D)[None, :]
            # Past the L1 cache, which does not see what other programs write.
            log = tl.load(sums + row, mask=there, other=float("-inf"), cache_modifier=".cg")
            part = tl.load(partial + row[:, None] * D + d[None, :], mask=kept, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(best, log)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            decay, weight = tl.exp2(best - base), tl.exp2(log - base)
            total = total * decay + weight
            acc = acc * decay[:, None] + part * weight[:, None]
            best = higher
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + where[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _attention(
    query, keys, values, lengths, visible, offsets, out, partial, sums, arrivals, slots, capacity, splits, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, DIVIDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr, XCDS: tl.constexpr, LAUNCHES: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, tile, split, index = _place(slots, splits, KV_HEADS, GROUP, BLOCK_M, XCDS)
    slot, real, where = _rows(sequence, kv_head, tile * BLOCK_M, slots, KV_HEADS, GROUP, D, BLOCK_M)
    length = tl.load(lengths + sequence)
    first, last, share = _share(length, slots, splits, offsets, slot, visible is None, WINDOW, BLOCK_N, SPLIT_BLOCKS)
    begin = first + split * share
    if begin >= last:
        return
    stop = tl.minimum(begin + share, last)
    d = tl.arange(0, BLOCK_D)
    kept = real[:, None] & (d < D)[None, :]
    q = tl.load(query + where[:, None] + d[None, :], mask=kept, other=0.0)
    start = (sequence.to(tl.int64) * capacity * KV_HEADS + kv_head) * D
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sure = length  # keys before it are seen by all rows
    if visible is None and WINDOW == 0:
        sure += tile * BLOCK_M // GROUP + 1
    edge = tl.minimum(tl.maximum(sure // BLOCK_N, begin), stop)
    for block in range(begin, edge):
        best, total, acc = _attend_block(
            q, keys + start, values + start, block, length + slots, length, slots, visible, offsets, slot, real, scale,
            best, total, acc, WINDOW, KV_HEADS * D, D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    # Seldom more than two blocks; and a pipelined mask would take the registers of every stage.
    for block in tl.range(edge, stop, num_stages=1):
        best, total, acc = _attend_block(
            q, keys + start, values + start, block, length + slots, length, slots, visible, offsets, slot, real, scale,
            best, total, acc, WINDOW, KV_HEADS * D, D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    active = tl.cdiv(last - first, share)
    if DIVIDED and active > 1:
        row = (index * splits + split) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(partial + row[:, None] * D + d[None, :], acc, mask=kept)
        tl.store(sums + row, best + tl.log2(tl.where(total == 0, 1.0, total)), mask=real)
        if LAUNCHES == 1:
            tl.debug_barrier()  # every thread's part is written before this program is counted
            if tl.atomic_add(arrivals + index, 1) == active - 1:
                tl.store(arrivals + index, 0)  # for the next launch
                _join(
                    out, partial, sums, sequence, kv_head, tile, index, active, slots, splits, KV_HEADS, GROUP, D,
                    BLOCK_D, BLOCK_M, ROWS,
                )  # fmt: skip
    else:
        tl.store(out + where[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _join_all(
    lengths, offsets, out, partial, sums, slots, splits, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT_BLOCKS: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, tile, _, index = _place(slots, 1, KV_HEADS, GROUP, BLOCK_M, 1)
    slot, _, _ = _rows(sequence, kv_head, tile * BLOCK_M, slots, KV_HEADS, GROUP, D, BLOCK_M)
    length = tl.load(lengths + sequence)
    first, last, share = _share(length, slots, splits, offsets, slot, CAUSAL, WINDOW, BLOCK_N, SPLIT_BLOCKS)
    active = tl.cdiv(last - first, share)
    if active > 1:  # a split that was alone has written the output itself
        _join(
            out, partial, sums, sequence, kv_head, tile, index, active, slots, splits, KV_HEADS, GROUP, D, BLOCK_D,
            BLOCK_M, ROWS,
        )  # fmt: skip


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slots: int,
    visible: Tensor | None,
    offsets: Tensor,
    window: int | None,
    *,
    tiling: Tiling,
) -> Tensor:
    """`reference.attention` in one or two launches. Tensors must be contiguous.

    tiling: BLOCK_M rows (slots x query heads of a KV head) and BLOCK_N keys of a tile, powers of two from 16 on;
    PROGRAMS, as many as keys are divided for; SPLIT_BLOCKS, the fewest blocks of keys worth a program; LAUNCHES, 1
    (not on AMD: UserError) or 2; XCDS, the L2 caches that programs are handed out to in turn. In fp32, which NVIDIA's
    matrix cores do not multiply exactly, tiles have 16 rows and half the keys: larger ones spill kilobytes.

    With LAUNCHES 1, calls on one device must not overlap: they share counters, which are allocated (and zeroed) by the
    first call. Make that one before capturing a graph.
    """
    require(not torch.version.hip or tiling["LAUNCHES"] == 2, "LAUNCHES must be 2 on AMD, but is 1 in this tiling")
    if query.dtype == torch.float32:
        tiling = {**tiling, "BLOCK_M": 16, "BLOCK_N": max(16, tiling["BLOCK_N"] // 2)}
    tokens, heads, width = query.shape
    batch, capacity, groups = len(lengths), keys.shape[1], keys.shape[2]
    tiles = batch * groups * triton.cdiv(slots * (heads // groups), tiling["BLOCK_M"])
    most = capacity if window is None else min(capacity, window + slots + tiling["BLOCK_N"])
    shares = triton.cdiv(most, tiling["BLOCK_N"] * tiling["SPLIT_BLOCKS"])
    splits = max(1, min(shares, tiling["PROGRAMS"] // tiles)) if tiles <= SHARED_TILES else 1
    out = torch.empty(tokens, heads * width, dtype=query.dtype, device=query.device)
    partial = sums = arrivals = None
    if splits > 1:
        rows = tiles * splits * tiling["BLOCK_M"]
        partial = torch.empty(rows, width, dtype=torch.float32, device=query.device)
        sums = torch.empty(rows, dtype=torch.float32, device=query.device)
        arrivals = _counters(query.device) if tiling["LAUNCHES"] == 1 else None
    shape: dict[str, Any] = {
        "KV_HEADS": groups,
        "GROUP": heads // groups,
        "D": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "WINDOW": window or 0,
        "ROWS": min(tiling["BLOCK_M"], triton.next_power_of_2(slots * (heads // groups))),
    }
    places = {"lengths": lengths, "offsets": offsets, "out": out, "partial": partial, "sums": sums}
    sizes = {"slots": slots, "splits": splits}
    launch(
        _attention,
        (tiles * splits,),
        {"query": query, "keys": keys, "values": values, "visible": visible, "arrivals": arrivals}
        | places
        | sizes
        | {"capacity": capacity, "scale": width**-0.5 * LOG2_E},
        shape | {"DIVIDED": splits > 1},
        {name: value for name, value in tiling.items() if name != "PROGRAMS"},
    )
    if splits > 1 and tiling["LAUNCHES"] == 2:
        unused = ("PROGRAMS", "LAUNCHES", "XCDS", "matrix_instr_nonkdim", "kpack")
        launch(
            _join_all,
            (tiles,),
            places | sizes,
            shape | {"CAUSAL": visible is None},
            {name: value for name, value in tiling.items() if name not in unused},
        )
    return out


def _counters(device: torch.device) -> Tensor:
    """int32 [SHARED_TILES], zero between launches: a tile's last program to arrive sets its counter back."""
    if device not in _arrivals:
        _arrivals[device] = torch.zeros(SHARED_TILES, dtype=torch.int32, device=device)
    return _arrivals[device]
