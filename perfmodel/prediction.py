"""What the performance model answers: one type for an operator, one for a forward, one for a decoding step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perfmodel.parallel import Parallel
from runtime.config import DecodingConfig, Workload

Bound = Literal["memory", "compute", "overhead"]


@dataclass(frozen=True)
class OperatorPrediction:
    """One operator summed over the layers of one forward (or of the step's own work, for the sampler)."""

    name: str
    flops: float
    bytes: float  # moved to and from memory
    launches: float
    seconds: float  # calibrated estimate, the operator's share of overhead included
    bound_seconds: float  # roofline at datasheet peaks: no measurement may be below
    bound: Bound  # what the estimate is made of for the most part

    @property
    def arithmetic_intensity(self) -> float:
        """FLOPs per byte; 0 for an operator that moves nothing."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class ForwardPrediction:
    """One model forward of batch x slots tokens over a cached context."""

    name: str  # as in `perfmodel.steps`: "decode", "draft", "verify", ...
    times: float  # how often a step runs it; what follows is of one
    slots: int
    seconds: float
    bound_seconds: float
    bound: Bound
    flops: float
    bytes: float
    experts_per_layer: float
    operators: tuple[OperatorPrediction, ...]


@dataclass(frozen=True)
class Prediction:
    """One decoding step on one device, and what follows from it."""

    model: str
    hardware: str
    engine: str
    workload: Workload
    decoding: DecodingConfig
    context: int  # cached tokens per sequence
    expert_coverage: str  # "uniform", "measured", "correlated(0.3)", "zipf(0.9)", "all", "min"
    acceptance_length: float  # tokens committed per step and sequence, with the verifier's own
    tokens_per_forward: float  # of one sequence
    forwards: tuple[ForwardPrediction, ...]
    operators: tuple[OperatorPrediction, ...]  # summed over the forwards, with the sampler; they add up to the step
    sampler_seconds: float
    step_seconds: float
    bound_step_seconds: float
    bound: Bound
    tokens_per_second: float  # all sequences of the batch together, in the steady state: slots kept full
    bound_tokens_per_second: float
    autoregressive_step_seconds: float
    speedup_over_autoregressive: float
    experts_per_layer: float  # in the step's widest forward
    ridge_point_flops_per_byte: float
    precision: str  # element types, as `precision.Precision` names them
    fastest_dtype: str  # the one with the highest peak of those that its matmuls run at
    parallel: Parallel
    # Of a fixed set of requests run to the end, the last ones alone; None: how requests differ is not known.
    closed_batch_tokens_per_second: float | None
    step_seconds_interval: tuple[float, float] | None  # meant to hold 80% of measured steps; None: spread not known
    joules_per_million_tokens: float | None  # estimates, see `perfmodel.economics`; None where the profile lacks them
    dollars_per_million_tokens: float | None
