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
    """A linear layer: [m, k] x [k, n]. `cold`: its weights come from main memory, as in a model larger than caches."""

    m: npt.ArrayLike
    n: npt.ArrayLike
    k: npt.ArrayLike
    weights: str = "bfloat16"
    activations: str = "bfloat16"
    cold: bool = True


@dataclass(frozen=True)
class FusedMoe:
    """Gate, up and down of all experts that `tokens` tokens hit: routing is given as `distinct` experts that are read.

    gate_up: matrices before the activation (2 with a gate). Bytes and FLOPs of one layer on one device.
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


@dataclass(frozen=True)
class Attention:
    """`slots` query rows of each of `batch` sequences over `context` cached tokens, whose KV is read once for all."""

    batch: npt.ArrayLike
    slots: npt.ArrayLike
    context: npt.ArrayLike
    query_heads: npt.ArrayLike
    kv_heads: npt.ArrayLike
    head_dim: npt.ArrayLike
    cache: str = "bfloat16"


@dataclass(frozen=True)
class Collective:
    """`size_bytes` per device summed (all_reduce) or exchanged (all_to_all) over `devices` of one node."""

    size_bytes: npt.ArrayLike
    devices: npt.ArrayLike
    kind: str = "all_reduce"


def roofline(hardware: HardwareProfile, dtype: str, flops: npt.ArrayLike, size_bytes: npt.ArrayLike) -> Array:
    """Seconds below which no kernel can be that must do these FLOPs and bring these bytes from main memory.

    Datasheet peaks: max(flops / peak, bytes / peak bandwidth); Williams et al. 2009.
    """
    peak = {str(name): rate for name, rate in hardware.peak_flops_per_second.items()}[dtype]
    bandwidth = hardware.main_memory.peak_bandwidth_bytes_per_second
    assert bandwidth is not None  # a profile without it is refused when it is read
    return np.maximum(np.asarray(flops, dtype=float) / peak, np.asarray(size_bytes, dtype=float) / bandwidth)
