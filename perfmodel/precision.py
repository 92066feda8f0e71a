"""Element types of a deployment: what weights, experts and cache are stored in, and which peak their arithmetic has."""

from __future__ import annotations

from dataclasses import dataclass

from hardware.files import known
from hardware.profile import HardwareProfile

# Bytes an element takes with its share of the scales. mxfp4: 4 bits and 8 bits for 32 elements (OCP MX 1.0); nvfp4: 8
# bits for 16; int4: 16 bits for 128 (AWQ, GPTQ); block-scaled fp8: 32 bits for 128 x 128, which is nothing.
STORED_BYTES: dict[str, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "mxfp4": 4.25 / 8,
    "nvfp4": 4.5 / 8,
    "int4": 4.125 / 8,
}


def stored_bytes(dtype: str) -> float:
    """Bytes of one element in memory; UserError for an unknown dtype."""
    if dtype not in STORED_BYTES:
        raise known("dtype", dtype, STORED_BYTES)
    return STORED_BYTES[dtype]


def arithmetic_dtype(hardware: HardwareProfile, weights: str, activations: str) -> str:
    """The dtype whose peak a matmul of these two runs at: that of the wider operand.

    Weights narrower than the activations are widened in registers (w4a16), so they save bytes, not arithmetic.
    UserError where the device has no peak for the dtype: nothing else is widened, an engine would refuse it too.
    """
    wide = max((activations, weights), key=stored_bytes)
    peak = {"mxfp4": "fp4", "nvfp4": "fp4"}.get(wide, wide)
    peaks = {str(name) for name in hardware.peak_flops_per_second}
    if peak not in peaks:
        raise known(f"dtype of {hardware.name}", peak, peaks)
    return peak


def fastest_dtype(hardware: HardwareProfile, precision: Precision) -> str:
    """The dtype with the highest peak of those that a model's matmuls run at. UserError as for `arithmetic_dtype`."""
    p = precision
    pairs = ((p.weights, p.activations), (p.experts, p.expert_activations), (p.head, p.head))
    peaks = {str(name): peak for name, peak in hardware.peak_flops_per_second.items()}
    return max((arithmetic_dtype(hardware, *pair) for pair in pairs), key=peaks.__getitem__)


def attention_dtypes(hardware: HardwareProfile, cache: str) -> tuple[str, str]:
    """What attention over a cache multiplies, keys first: an fp8 cache meets fp8 queries where the device multiplies
    fp8; any other narrow cache is widened to bfloat16."""
    if cache == "fp8" and "fp8" in {str(name) for name in hardware.peak_flops_per_second}:
        return cache, cache
    return cache, "bfloat16" if stored_bytes(cache) < stored_bytes("bfloat16") else cache


@dataclass(frozen=True)
class Precision:
    """What a model is served in. `activations` meet the weights in the matmuls; the LM head is stored in `head`."""

    weights: str = "bfloat16"
    experts: str = "bfloat16"
    cache: str = "bfloat16"
    head: str = "bfloat16"
    activations: str = "bfloat16"
    expert_activations: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in (self.weights, self.experts, self.cache, self.head, self.activations, self.expert_activations):
            stored_bytes(name)

    def __str__(self) -> str:
        parts = [self.weights]
        if self.experts != self.weights:
            parts.append(f"{self.experts} experts")
        if self.cache != self.weights:
            parts.append(f"{self.cache} cache")
        return ", ".join(parts)


def uniform(dtype: str) -> Precision:
    """One of the runtime's dtypes for everything."""
    return Precision(dtype, dtype, dtype, dtype, dtype, dtype)


def quantised(
    weights: str, *, experts: str | None = None, cache: str = "bfloat16", activations: str | None = None
) -> Precision:
    """Linear layers (and experts) in a narrow dtype; LM head, norms and, unless said, the cache stay bfloat16.

    fp8 weights meet fp8 activations; narrower ones meet bfloat16 unless `activations` says otherwise.
    """
    meets = activations or ("fp8" if weights == "fp8" else "bfloat16")
    of_experts = experts or weights
    experts_meet = activations or ("fp8" if of_experts == "fp8" else "bfloat16")
    return Precision(weights, of_experts, cache, "bfloat16", meets, experts_meet)
