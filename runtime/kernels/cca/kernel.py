"""CCA between the projections and attention as one Triton launch: a program per head and tile of tokens.

A program convolves its head, adds the means, normalises, rotates, and writes the query or the key; it also copies its
head's column into the ring, and a key's program the value. Nothing passes between programs: the ring entries that one
launch reads and those it writes are different ones.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from runtime.config import require
from runtime.kernels.cca.reference import EPS, CCAWeights
from runtime.kernels.launch import launch
from runtime.kernels.target import Tiling


@triton.jit
def _taken(projected, columns, row, index, length, slots, ring, channel, mask, HISTORY, COLUMN, WIDTH):
    """Channels of what tap `index` [M] of sequence `row` stands for: a column of the ring, or of a slot."""
    cached = (index < HISTORY)[:, None]
    entry = row * (ring + 1) + (length + index + (ring - HISTORY)) % ring
    old = tl.load(columns + entry[:, None] * COLUMN + channel, mask=mask & cached, other=0.0)
    token = row * slots + (index - HISTORY)
    new = tl.load(projected + token[:, None] * WIDTH + channel, mask=mask & (index >= HISTORY)[:, None], other=0.0)
    return tl.where(cached, old, new)


@triton.jit
def _cca(
    projected, convolution, bias, temperature, keys, values, columns, lengths, offsets, taps, cos, sin, swap, query,
    tokens, slots, committed, capacity, ring,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, TAPS: tl.constexpr, EPS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    HISTORY: tl.constexpr = TAPS - 1
    CHANNELS: tl.constexpr = (HQ + HK) * D
    HALF: tl.constexpr = HK * D // 2
    COLUMN: tl.constexpr = CHANNELS + HALF
    WIDTH: tl.constexpr = COLUMN + HALF
    PIECES: tl.constexpr = PAD // BK  # of a tap's input channels
    head = tl.program_id(1)
    d = tl.arange(0, PAD)
    inside = (d < D)[None, :]
    piece = tl.arange(0, BK)
    convolution += head * (TAPS * D * D)

    # One token: all weights are on their way before the first value that anything waits for.
    loaded = ()
    if BM == 1:
        for step in tl.static_range(TAPS * PIECES):
            k = (step % PIECES) * BK + piece
            weight = convolution + ((step // PIECES) * D + k)[:, None] * D + d[None, :]
            early = tl.load(weight, mask=(k < D)[:, None] & inside, other=0.0)
            loaded = loaded + (early,)  # type: ignore[assignment]

    token = tl.program_id(0) * BM + tl.arange(0, BM)
    real = token < tokens
    row, slot = (token // slots).to(tl.int64), token % slots  # offsets into a cache need 64 bits
    length = tl.load(lengths + row, mask=real, other=0)
    index = ()
    for tap in tl.static_range(TAPS):
        index = index + (tl.load(taps + slot * TAPS + tap, mask=real, other=0),)  # type: ignore[assignment]
    mask = real[:, None] & inside
    position = length + tl.load(offsets + slot, mask=real, other=0)
    own = tl.load(projected + token[:, None] * WIDTH + (head * D + d)[None, :], mask=mask, other=0.0)
    angle = (position * D)[:, None] + d[None, :]
    if BM <= 16:  # few tokens wait for memory, many are short of registers
        cosine, sine = tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)
    taken = ()
    if BM == 1:
        for step in tl.static_range(TAPS * PIECES):
            k = (step % PIECES) * BK + piece
            x = _taken(
                projected, columns, row, index[step // PIECES], length, slots, ring, (head * D + k)[None, :],
                real[:, None] & (k < D)[None, :], HISTORY, COLUMN, WIDTH,
            )  # fmt: skip
            taken = taken + (x,)  # type: ignore[assignment]
    partner = tl.load(swap + d, mask=d < D, other=0).to(tl.int32)
    shift = tl.load(bias + head * D + d, mask=d < D, other=0.0).to(tl.float32)
    group = head - HQ  # of a key's program
    scale = 1.0
    mean = own.to(tl.float32)
    kept = real & (slot < committed)
    entry = columns + (row * (ring + 1) + (length + slot) % ring)[:, None] * COLUMN
    if head < HQ:
        key = (HQ + head // (HQ // HK)) * D + d
        mean += tl.load(projected + token[:, None] * WIDTH + key[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        scale = tl.load(temperature + group)
        for member in tl.static_range(HQ // HK):
            other = (group * (HQ // HK) + member) * D + d
            member_query = tl.load(projected + token[:, None] * WIDTH + other[None, :], mask=mask, other=0.0)
            mean += member_query.to(tl.float32) * (HK / HQ)
        # The value: the first half from this token, the second from the one before.
        v = (group * D + d)[None, :]
        value = tl.load(projected + token[:, None] * WIDTH + COLUMN + v, mask=mask & (v < HALF), other=0.0)
        delayed = _taken(
            projected, columns, row, index[TAPS - 2], length, slots, ring, CHANNELS - HALF + v, mask & (v >= HALF),
            HISTORY, COLUMN, WIDTH,
        )  # fmt: skip
        behind = ((row * capacity + length + slot) * (HK * D))[:, None] + v
        tl.store(values + behind, tl.where(v < HALF, value, delayed), mask=mask)
        half = mask & (v < HALF)
        late = tl.load(projected + token[:, None] * WIDTH + CHANNELS + v, mask=half, other=0.0)
        tl.store(entry + CHANNELS + v, late, mask=half & kept[:, None])
    tl.store(entry + (head * D + d)[None, :], own, mask=mask & kept[:, None])

    qk = mean * 0.5 + shift[None, :]
    if BM == 1:
        products = tl.zeros((BK, PAD), tl.float32)
        for step in tl.static_range(TAPS * PIECES):
            products += tl.trans(taken[step]).to(tl.float32) * loaded[step].to(tl.float32)
        qk += tl.sum(products, 0)[None, :]
    else:
        for start in range(0, PAD, BK):
            k = start + piece
            for tap in tl.static_range(TAPS):
                x = _taken(
                    projected, columns, row, index[tap], length, slots, ring, (head * D + k)[None, :],
                    real[:, None] & (k < D)[None, :], HISTORY, COLUMN, WIDTH,
                )  # fmt: skip
                place = convolution + (tap * D + k)[:, None] * D + d[None, :]
                part = tl.load(place, mask=(k < D)[:, None] & inside, other=0.0)
                qk = tl.dot(x, part, qk, input_precision="ieee")

    if BM > 16:
        cosine, sine = tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)
    qk = qk * (scale * tl.rsqrt(tl.sum(qk * qk, 1) / D + EPS))[:, None]
    turned = tl.gather(qk, tl.broadcast_to(partner[None, :], (BM, PAD)), 1)
    turned = (qk * cosine.to(tl.float32) + turned * sine.to(tl.float32)).to(query.dtype.element_ty)
    if head < HQ:
        tl.store(query + ((token * HQ + head) * D)[:, None] + d[None, :], turned, mask=mask)
    else:
        behind = (((row * capacity + length + slot) * HK + group) * D)[:, None] + d[None, :]
        tl.store(keys + behind, turned, mask=mask)


def cca(
    projected: Tensor,
    weights: CCAWeights,
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    taps: Tensor,
    committed: int,
    cos: Tensor,
    sin: Tensor,
    swap: Tensor,
    *,
    tiling: Tiling,
) -> Tensor:
    """The reference's arguments, contiguous, and values; committed + history columns must fit the ring (UserError).

    tiling: BM tokens of a program, 1 (products summed) or from 16 (matrix instructions); BK input channels at a time.
    """
    heads, count, width, _ = weights.convolution.shape
    tokens, slots, kv_heads, ring = projected.shape[0], taps.shape[0], keys.shape[2], columns.shape[1] - 1
    require(
        committed + count - 1 <= ring,
        f"committed + history <= ring columns must hold, but got {committed} + {count - 1} > {ring}",
    )
    query = projected.new_empty(tokens, heads - kv_heads, width)
    padded = max(16, triton.next_power_of_2(width))
    arguments = {
        "projected": projected, "convolution": weights.convolution, "bias": weights.convolution_bias,
        "temperature": weights.temperature, "keys": keys, "values": values, "columns": columns, "lengths": lengths,
        "offsets": offsets, "taps": taps, "cos": cos, "sin": sin, "swap": swap, "query": query, "tokens": tokens,
        "slots": slots, "committed": committed, "capacity": keys.shape[1], "ring": ring,
    }  # fmt: skip
    constants = {"HQ": heads - kv_heads, "HK": kv_heads, "D": width, "PAD": padded, "TAPS": count, "EPS": EPS}
    grid = (triton.cdiv(tokens, tiling["BM"]), heads)
    launch(_cca, grid, arguments, constants, {**tiling, "BK": min(tiling["BK"], padded)})
    return query
