"""Decode attention over a KV cache: what is cached is read once for all slots of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hardware.profile import HardwareProfile
from perfmodel.kernels.call import (
    Array,
    Attention,
    Parts,
    floats,
    main_bandwidth,
    matmul_rate,
    overlapped,
    require_positive,
    roofline,
)
from perfmodel.precision import arithmetic_dtype, attention_dtypes, stored_bytes

_ROWS = 64  # query rows of one tile of a decode kernel: fewer cost as much
_ELEMENT_BYTES = 2.0  # of queries and outputs


def kv_bytes(call: Attention) -> Array:
    """Bytes of the keys and values that the call reads, each once."""
    batch, context, heads, width = floats(call.batch, call.context, call.kv_heads, call.head_dim)
    return 2 * batch * context * heads * width * stored_bytes(call.cache)


def _query_bytes(call: Attention) -> Array:
    batch, slots, heads, width = floats(call.batch, call.slots, call.query_heads, call.head_dim)
    return 2 * _ELEMENT_BYTES * batch * slots * heads * width


def _flops(call: Attention, rows: Array) -> Array:
    """Of the products with keys and values, for so many query rows per KV head."""
    batch, heads, width = floats(call.batch, call.kv_heads, call.head_dim)
    met = np.asarray(call.context if call.met is None else call.met, dtype=float)
    return 4 * batch * heads * rows * met * width


def _rows(call: Attention) -> Array:
    """Query rows that share the keys of one KV head: those of all slots."""
    slots, queries, heads = floats(call.slots, call.query_heads, call.kv_heads)
    return slots * queries / heads


def bound(call: Attention, hardware: HardwareProfile) -> Array:
    """Seconds at datasheet peaks: KV, queries and outputs once; 4 FLOPs per query, key and channel.

    A KV that is not `cold` and fits the last cache comes from there, whose peak may be unknown: then only FLOPs bind.
    """
    flops = _flops(call, _rows(call))
    moved = kv_bytes(call) + _query_bytes(call)
    from_memory = roofline(hardware, _dtype(call, hardware), flops, moved)
    if call.cold or len(hardware.memory) < 2:
        return from_memory
    cache = hardware.memory[-2]
    peak = cache.peak_bandwidth_bytes_per_second or np.inf
    from_cache = np.maximum(roofline(hardware, _dtype(call, hardware), flops, 0.0), moved / peak)
    return np.where(moved <= cache.capacity_bytes, from_cache, from_memory)


def _dtype(call: Attention, hardware: HardwareProfile) -> str:
    """The dtype whose peak the products have."""
    return arithmetic_dtype(hardware, *attention_dtypes(hardware, call.cache))


@dataclass(frozen=True)
class AttentionKernels:
    """fixed + the longer of reading and multiplying, which overlap imperfectly.

    fixed_seconds: writing the new keys and values, starting and draining the kernel, joining its splits; about the
    same on every device that was measured, each call replayed as a graph of its own.
    bandwidth_share: of the main memory's achieved bandwidth. cache_share: the bandwidth of a KV that stayed in the last
    cache, over that of main memory. split_bytes: per compute unit, read in vain while the splits of a long call start
    and end, and in proportion less by a shorter one. compute_share: of the achieved FLOPs.
    """

    fixed_seconds: float
    bandwidth_share: float
    cache_share: float
    split_bytes: float
    compute_share: float

    def __post_init__(self) -> None:
        require_positive(self)

    def time(self, call: Attention, hardware: HardwareProfile) -> Parts:
        """Seconds of the call. Arrays broadcast."""
        rate = main_bandwidth(hardware, self.bandwidth_share)
        read, split = kv_bytes(call), self.split_bytes * hardware.compute_units
        needed = read + _query_bytes(call)
        moved = needed + read * split / (read + split)
        memory = moved / rate
        if not call.cold and len(hardware.memory) > 1:
            cache = hardware.memory[-2]
            cached = min(rate * max(self.cache_share, 1.0), cache.peak_bandwidth_bytes_per_second or np.inf)
            kept = np.clip(2 - 2 * needed / cache.capacity_bytes, 0, 1)  # all of it up to half the cache, then less
            memory = memory * (1 - kept) + kept * moved / max(cached, rate)
        flops = _flops(call, np.ceil(_rows(call) / _ROWS) * _ROWS)
        compute = flops / (matmul_rate(hardware, _dtype(call, hardware)) * min(self.compute_share, 1.0))
        waits = overlapped(memory, compute)
        return Parts(*waits, np.full_like(waits[0], self.fixed_seconds))


# Published decode calls wait for memory and say little of their arithmetic, so its share stays near what is known of
# them: FlashAttention-3 reaches 740e12 on an H100 with long prompts (arXiv 2407.08608), 0.9 of a large matmul, and
# gathers the pages of a cache at less.
START = AttentionKernels(
    fixed_seconds=1e-5,
    bandwidth_share=1.0,
    cache_share=2.5,
    split_bytes=3e5,
    compute_share=0.6,
)
PRIOR = {"compute_share": 0.1}
