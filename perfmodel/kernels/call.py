"""One call of a kernel, as sizes: what a published row measures and what an operator of a forward consists of.

Sizes are numbers or arrays that broadcast, so that one call stands for a whole grid of them. Every family of kernels
(`gemm`, `moe`, `attention`, `collective`, `elementwise`) is a module beside this one: a frozen dataclass of fitted
numbers with `time(call, hardware) -> Parts`, and the call's own roofline as `bound(call, hardware)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hardware.profile import HardwareProfile
from perfmodel.precision import stored_bytes
from runtime.config import require

Array = npt.NDArray[np.float64]


class Parts(NamedTuple):
    """Seconds of a call by what they wait for; they add up to its time."""

    memory: Array
    compute: Array
    overhead: Array

    @property
    def seconds(self) -> Array:
        """All of it."""
        return self.memory + self.compute + self.overhead


@dataclass(frozen=True)
class Gemm:
    """A linear layer: [m, k] x [k, n].

    `cold`: its weights come from main memory, as in a model larger than caches. `quantise`: activations below 16 bits
    arrive wider, so that a kernel before the matmul narrows them; it is part of the layer's time.
    """

    m: npt.ArrayLike
    n: npt.ArrayLike
    k: npt.ArrayLike
    weights: str = "bfloat16"
    activations: str = "bfloat16"
    cold: bool = True
    quantise: bool = True


@dataclass(frozen=True)
class FusedMoe:
    """Gate, up and down of all experts that `tokens` tokens hit: routing is given as `distinct` experts that are read.

    gate_up: matrices before the activation (2 with a gate). Bytes and FLOPs of one layer on one device.
    imbalance: tokens of the expert that the average token meets, over the mean of the experts hit; 1: all alike.
    """

    tokens: npt.ArrayLike
    hidden: npt.ArrayLike
    expert_size: npt.ArrayLike
    experts: npt.ArrayLike
    top_k: npt.ArrayLike
    distinct: npt.ArrayLike
    weights: str = "bfloat16"
    activations: str = "bfloat16"
    gate_up: int = 2
    imbalance: npt.ArrayLike = 1.0


@dataclass(frozen=True)
class Attention:
    """`slots` query rows of each of `batch` sequences over `context` cached tokens, whose KV is read once for all.

    met: keys that a query row is multiplied with, where its own forward's are masked in part; None: all of `context`.
    `cold`: the cache comes from main memory, as in a model, whose weights pass through the caches between two layers.
    """

    batch: npt.ArrayLike
    slots: npt.ArrayLike
    context: npt.ArrayLike
    query_heads: npt.ArrayLike
    kv_heads: npt.ArrayLike
    head_dim: npt.ArrayLike
    cache: str = "bfloat16"
    cold: bool = True
    met: npt.ArrayLike | None = None


@dataclass(frozen=True)
class Collective:
    """`size_bytes` per device summed (all_reduce) or exchanged (all_to_all) over `devices` of one node.

    `custom`: the engine may use a kernel of its own where that is faster, as engines do for small sums within a
    captured graph; else the vendor's library (NCCL, RCCL) does it.
    """

    size_bytes: npt.ArrayLike
    devices: npt.ArrayLike
    kind: str = "all_reduce"
    custom: bool = True


def roofline(hardware: HardwareProfile, dtype: str, flops: npt.ArrayLike, size_bytes: npt.ArrayLike) -> Array:
    """Seconds below which no kernel can be that must do these FLOPs and bring these bytes from main memory.

    Datasheet peaks: max(flops / peak, bytes / peak bandwidth); Williams et al. 2009.
    """
    peak = {str(name): rate for name, rate in hardware.peak_flops_per_second.items()}[dtype]
    bandwidth = hardware.main_memory.peak_bandwidth_bytes_per_second
    assert bandwidth is not None  # a profile without it is refused when it is read
    return np.maximum(np.asarray(flops, dtype=float) / peak, np.asarray(size_bytes, dtype=float) / bandwidth)


def kind_of(call: object) -> str:
    """What the spread of a call's estimates is that of: 16-bit operands or narrower ones; "" where it has none."""
    dtypes = [str(getattr(call, name)) for name in ("weights", "activations", "cache") if hasattr(call, name)]
    if not dtypes:
        return ""
    return "16-bit" if min(map(stored_bytes, dtypes)) >= 2 else "narrow"


def floats(*sizes: npt.ArrayLike) -> list[Array]:
    """Sizes as arrays of floats, to calculate with."""
    return [np.asarray(size, dtype=float) for size in sizes]


def main_bandwidth(hardware: HardwareProfile, share: float = 1.0) -> float:
    """A share of the bytes per second that a stream from main memory achieved, at most the peak.

    The achieved rate is the peak where no figure of it is known.
    """
    memory = hardware.main_memory
    peak = memory.peak_bandwidth_bytes_per_second
    assert peak is not None  # a profile without it is refused when it is read
    return min((memory.achieved_bandwidth_bytes_per_second or peak) * share, peak)


def matmul_rate(hardware: HardwareProfile, dtype: str) -> float:
    """FLOPs per second that a large matmul achieved; the peak where no figure of it is known."""
    rates = hardware.peak_flops_per_second | hardware.achieved_flops_per_second
    return {str(name): rate for name, rate in rates.items()}[dtype]


def overlapped(memory: npt.ArrayLike, compute: npt.ArrayLike, sharpness: float = 3.0) -> tuple[Array, Array]:
    """Seconds of two streams of work that run at the same time, each one's part of the whole (`together`)."""
    one, other = floats(memory, compute)
    whole, ratio = _together(one, other, sharpness)
    more = whole / (1 + ratio)
    less = whole - more
    first = one >= other
    return np.where(first, more, less), np.where(first, less, more)


def together(memory: Array, compute: Array, sharpness: float) -> Array:
    """Seconds of two streams of work that run at the same time.

    (memory^s + compute^s)^(1/s): the longer one, and somewhat more where both are about as long, since neither fills
    the other's gaps perfectly. Never less than the longer one, nor more than their sum.
    """
    return _together(memory, compute, sharpness)[0]


def _together(one: Array, other: Array, sharpness: float) -> tuple[Array, Array]:
    """The whole, and (shorter / longer)^s. Powers by exp2 and log2, which NumPy vectorises."""
    longest = np.maximum(np.maximum(one, other), 1e-30)
    ratio = np.exp2(sharpness * np.log2(np.maximum(np.minimum(one, other) / longest, 1e-30)))
    return longest * np.exp2(np.log2(1 + ratio) / sharpness), ratio


def require_positive(kernels: object) -> None:
    """UserError unless every number of a family is > 0 and finite."""
    for name, value in vars(kernels).items():
        require(0 < value < np.inf, f"{name} > 0 must hold, but got {value}")
