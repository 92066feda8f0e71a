"""Fused mixture-of-experts layer: routing, gate and up, activation, down, and the sum over a token's experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hardware.files import UserError, known
from hardware.profile import HardwareProfile
from perfmodel.kernels.call import (
    Array,
    FusedMoe,
    Parts,
    floats,
    main_bandwidth,
    matmul_rate,
    overlapped,
    require_positive,
    roofline,
)
from perfmodel.precision import arithmetic_dtype, stored_bytes
from runtime.config import require

_TILE = 16  # tokens of one expert that cost as much as one
_DRAWS = 64  # of a random routing, for its mean


def expert_elements(call: FusedMoe) -> Array:
    """Weights of one expert: gate, up and down."""
    hidden, width = floats(call.hidden, call.expert_size)
    return hidden * width * (call.gate_up + 1)


def weight_bytes(call: FusedMoe) -> Array:
    """Bytes of the distinct experts' weights, each read once."""
    return expert_elements(call) * np.asarray(call.distinct, dtype=float) * stored_bytes(call.weights)


def bound(call: FusedMoe, hardware: HardwareProfile) -> Array:
    """Seconds at datasheet peaks: distinct experts and the layer's input and output once; FLOPs without padding."""
    tokens, hidden, top_k = floats(call.tokens, call.hidden, call.top_k)
    flops = 2 * tokens * top_k * expert_elements(call)
    moved = weight_bytes(call) + 2 * tokens * hidden * stored_bytes(call.activations)
    return roofline(hardware, arithmetic_dtype(hardware, call.weights, call.activations), flops, moved)


@dataclass(frozen=True)
class MoeKernels:
    """fixed + the longer of moving and multiplying, which overlap imperfectly.

    fixed_seconds: starting and draining the kernels (top-k, sorting, two matmuls, activation, sum), about the same on
    every device that was measured; quantise_seconds: what activations narrower than 16 bits add.
    bandwidth_share, compute_share: of the achieved figures. cache_share: of the first cache's achieved bandwidth, for
    weights that pass through again (see `repeats`). widened_share: what of the compute share is left where weights
    narrower than the activations are widened first.
    """

    fixed_seconds: float
    quantise_seconds: float
    bandwidth_share: float
    cache_share: float
    compute_share: float
    widened_share: float

    def __post_init__(self) -> None:
        require_positive(self)

    def time(self, call: FusedMoe, hardware: HardwareProfile) -> Parts:
        """Seconds of the layer. Arrays broadcast."""
        rate = main_bandwidth(hardware, self.bandwidth_share)
        memory = (weight_bytes(call) + _activation_bytes(call)) / rate
        memory = memory + weight_bytes(call) * repeats(call) / (_cache_bandwidth(hardware) * self.cache_share)
        tokens, top_k, distinct = floats(call.tokens, call.top_k, call.distinct)
        # The last tile of an expert is half full on average, and an expert with few tokens still takes one.
        padded = np.maximum(tokens * top_k + distinct * (_TILE / 2), distinct * _TILE)
        # Units that multiply 4-bit floats also take one operand of 4 and one of 8 bits (Blackwell's mxf8f6f4).
        mixed = call.activations == "fp8" and "fp4" in {str(name) for name in hardware.peak_flops_per_second}
        widened = stored_bytes(call.weights) < stored_bytes(call.activations) and not mixed
        fraction = self.compute_share * (self.widened_share if widened else 1.0)
        dtype = arithmetic_dtype(hardware, call.weights, call.activations)
        compute = 2 * padded * expert_elements(call) / (matmul_rate(hardware, dtype) * min(fraction, 1.0))
        waits = overlapped(memory, compute)
        narrow = stored_bytes(call.activations) < 2
        return Parts(*waits, np.full_like(waits[0], self.fixed_seconds + narrow * self.quantise_seconds))


START = MoeKernels(
    fixed_seconds=2e-5,
    quantise_seconds=4e-6,
    bandwidth_share=0.9,
    cache_share=0.8,
    compute_share=0.6,
    widened_share=0.4,
)


def repeats(call: FusedMoe) -> Array:
    """Tiles beyond the first of each expert, per expert: busy experts need more than the tile that fits the mean.

    The tile grows with the mean tokens of an expert (16 to 128), so that only imbalance makes an expert outgrow it. An
    empirical form, within 0.1 of counting for power-law routings whose experts have up to 128 tokens.
    """
    tokens, top_k, distinct, imbalance = floats(call.tokens, call.top_k, call.distinct, call.imbalance)
    filled = np.minimum(tokens * top_k / np.maximum(distinct, 1.0) / _TILE, 1.0)
    return filled**2 * (1 - 1 / np.maximum(imbalance, 1.0))


def _cache_bandwidth(hardware: HardwareProfile) -> float:
    """Of the first cache; of main memory where no figure is known."""
    first = hardware.memory[0]
    return (
        first.achieved_bandwidth_bytes_per_second or first.peak_bandwidth_bytes_per_second or main_bandwidth(hardware)
    )


def _activation_bytes(call: FusedMoe) -> Array:
    """Between the kernels: inputs gathered, gate and up out, activated, in again, one output per expert, their sum."""
    tokens, top_k, hidden, width = floats(call.tokens, call.top_k, call.hidden, call.expert_size)
    wide = 2.0 * (call.gate_up + 1) * width + 4.0 * hidden
    return tokens * top_k * (wide + (hidden + width) * stored_bytes(call.activations))


def loads_of(routing: str, tokens: int, experts: int, top_k: int) -> tuple[float, float]:
    """Distinct experts and the imbalance (see `FusedMoe`) of a benchmark's routing of T tokens to k of E experts.

    uniform: every token picks at random: E (1 - (1 - k / E)^T). balanced: as many as tokens can pick, min(E, k T).
    power_law_ALPHA: aiconfigurator's (its collector/helper.py at 095f58a): loads drawn from a density x^-ALPHA between
    1 and 0.8 T (0.01 and 2 where k T <= E), scaled to k T in all and rounded; what rounding misses goes to idle experts
    one by one, what it adds too much leaves the busiest, and no expert has more than T.
    """
    require(1 <= top_k <= experts, f"1 <= top_k <= experts must hold, but got {top_k} and {experts}")
    require(tokens >= 1, f"tokens >= 1 must hold, but got {tokens}")
    share = top_k / experts
    if routing == "uniform":
        distinct = experts * (1 - (1 - share) ** tokens)
        return distinct, (1 + (tokens - 1) * share) * distinct / (tokens * top_k)
    if routing == "balanced":
        return float(min(experts, top_k * tokens)), 1.0
    kind, _, number = routing.rpartition("_")
    if kind != "power_law":
        raise known("routing", routing, ("uniform", "balanced", "power_law_ALPHA"))
    try:
        alpha = float(number)
    except ValueError:
        raise UserError(f"power_law_ALPHA must end in a number, but is {routing!r}") from None
    require(alpha > 1, f"ALPHA > 1 must hold, but got {alpha}")
    return _power_law(alpha, tokens, experts, top_k)


@lru_cache(maxsize=1024)
def _power_law(alpha: float, tokens: int, experts: int, top_k: int) -> tuple[float, float]:
    total = tokens * top_k
    low, high = (1.0, max(0.8 * tokens, 1.0)) if total > experts else (0.01, 2.0)
    draws = np.random.default_rng(0).random((_DRAWS, experts))
    power = 1 - alpha
    loads = ((high**power - low**power) * draws + low**power) ** (1 / power)
    counts = np.minimum(np.rint(loads / loads.sum(1, keepdims=True) * total), tokens)
    missing = np.maximum(total - counts.sum(1), 0)
    found = (counts > 0).sum(1) + np.minimum(missing, (counts == 0).sum(1))
    found = np.minimum(found, total)  # what rounding added to experts of one token leaves them idle
    squares = (counts**2).sum(1) + missing  # those that rounding missed are one to an expert
    return float(found.mean()), max(float((squares * found).mean() / total**2), 1.0)
