"""What a published row measures, typed: enough to predict it, and nothing assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hardware.profile import HardwareProfile
from perfmodel.model_spec import ModelSpec
from perfmodel.precision import Precision
from runtime.config import DecodingConfig

TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}  # seconds of one
KernelFamily = Literal["gemm", "moe", "attention", "collective", "elementwise"]


@dataclass(frozen=True)
class Unit:
    """The unit of a row as a time: `scale` seconds, or `scale` per second of something that is done `work` times.

    A row of 2 TFLOPS of a call of 1e12 FLOPs has scale 1e12 and work 1e12: it took 0.5 s.
    """

    name: str
    scale: float
    work: float | None = None  # None: the row is a time

    @property
    def is_rate(self) -> bool:
        """Whether more is faster, so that a bound on the time bounds the row from above."""
        return self.work is not None

    def seconds(self, value: float) -> float:
        """The time that a row's value stands for."""
        return value * self.scale if self.work is None else self.work / (value * self.scale)

    def value(self, seconds: float) -> float:
        """A time in the row's own unit."""
        return seconds / self.scale if self.work is None else self.work / (seconds * self.scale)


@dataclass(frozen=True)
class Point:
    """A row that can be predicted. operator: the kind of prediction it tests; engine: what ran it, without versions."""

    id: str
    source: str
    series: str
    operator: str
    engine: str
    hardware: HardwareProfile
    unit: Unit
    measured: float  # in the row's unit

    @property
    def measured_seconds(self) -> float:
        """The measured time; for a rate, of what `unit.work` counts."""
        return self.unit.seconds(self.measured)


@dataclass(frozen=True)
class KernelPoint(Point):
    """One call of one kernel."""

    family: KernelFamily
    call: Any  # of `perfmodel.kernels`, all sizes scalars


@dataclass(frozen=True)
class ServedPoint(Point):
    """A model served at a fixed number of sequences in flight, in seconds per token.

    metric: per_token, the mean time of a sequence between its tokens, prefills of others included; between_tokens, the
    median gap between tokens, which no prefill interrupts; total, the time of a token of all sequences together.
    prompt: None where only the data set is named (`workload`). devices = tensor x data; experts are split over
    `expert` devices.
    """

    model: ModelSpec
    precision: Precision
    cache_stated: bool  # else the precision of the KV cache is the engine's own choice
    batch: float
    prompt: float | None
    generated: float
    workload: str
    devices: int
    tensor: int
    expert: int
    metric: Literal["per_token", "between_tokens", "total"]


@dataclass(frozen=True)
class TidarForwardPoint(Point):
    """One forward (verify or draft) of a TiDAR step, or its rejection sampler."""

    decoding: DecodingConfig
    batch: int
    generated_tokens: float
    part: Literal["draft", "verify", "sampler"]


@dataclass(frozen=True)
class TidarThroughputPoint(Point):
    """Tokens per second of a set of requests decoded by the ZAYA engine.

    acceptance_length: tokens committed per step, the verifier's own included; None for autoregressive decoding.
    refilled: finished sequences were replaced. ends_early: a sequence may end before `generated_tokens`. thinking: None
    where it is not said. build: the engine's commit. prefix: rows of one prefix, device and batch differ in
    the mode alone, so that their order can be compared.
    """

    decoding: DecodingConfig
    batch: int
    generated_tokens: float
    acceptance_length: float | None
    refilled: bool
    ends_early: bool
    thinking: bool | None
    build: str
    prefix: str
