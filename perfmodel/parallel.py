"""How a model is divided over the devices of one node, and what one of them is left with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from perfmodel.kernels.call import Array
from perfmodel.model_spec import ModelSpec
from runtime.config import require


@dataclass(frozen=True)
class Parallel:
    """tensor: devices that share every layer's matrices. expert: devices that the experts are dealt out to.

    expert <= tensor: within the tensor-parallel group, whose all-reduce also adds up the experts' results. expert >
    tensor: groups of `tensor` devices each decode sequences of their own, and exchange tokens for the experts.
    """

    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        require(
            self.tensor >= 1 and self.expert >= 1,
            f"tensor, expert >= 1 must hold, but got {self.tensor}, {self.expert}",
        )
        small, large = sorted((self.tensor, self.expert))
        require(
            large % small == 0,
            f"one of tensor and expert must divide the other, but got {self.tensor} and {self.expert}",
        )

    @property
    def devices(self) -> int:
        """How many there are in all."""
        return max(self.tensor, self.expert)

    @property
    def replicas(self) -> int:
        """Groups that decode sequences of their own."""
        return self.devices // self.tensor

    def of_replica(self, batch: Array) -> Array:
        """Sequences of the replica that has most of them."""
        return batch if self.replicas == 1 else np.ceil(batch / self.replicas)

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}"] if self.tensor > 1 else []
        return " ".join(parts + ([f"EP{self.expert}"] if self.expert > 1 else [])) or "one device"


ALONE = Parallel()


def divided(spec: ModelSpec, parallel: Parallel) -> ModelSpec:
    """The model that one device holds, but for the number of experts: heads, widths and vocabulary by `tensor`.

    Every device has at least one KV head; those of several are copies. The vocabulary is padded. UserError for sizes
    that do not divide.
    """
    if parallel.devices == 1:
        return spec
    tensor, (queries, keys) = parallel.tensor, spec.heads
    within = max(1, tensor // parallel.expert)  # devices that share one expert's matrices
    wanted = {"query heads": (queries, tensor), "dense MLP width": (spec.mlp_size, tensor)}
    wanted |= {"shared expert width": (spec.shared_expert_size, tensor), "expert width": (spec.expert_size, within)}
    wanted["experts"] = (spec.num_experts, parallel.expert)
    for name, (size, share) in wanted.items():
        require(size % share == 0, f"{name} must divide over {share} devices, but {spec.name} has {size}")
    require(
        keys % tensor == 0 or tensor % keys == 0,
        f"KV heads must divide over {tensor} devices, or they over the heads, but {spec.name} has {keys}",
    )
    require(
        parallel.expert == 1 or spec.num_experts > 0,
        f"expert parallelism needs experts, but {spec.name} has none",
    )
    return dataclasses.replace(
        spec,
        query_size=spec.query_size // tensor,
        kv_size=max(spec.kv_size // tensor, spec.head_dim),
        mlp_size=spec.mlp_size // tensor,
        shared_expert_size=spec.shared_expert_size // tensor,
        expert_size=spec.expert_size // within,
        vocab_size=math.ceil(spec.vocab_size / tensor),
    )


def sent_copies(experts: int, experts_per_token: int, parallel: Parallel) -> float:
    """Expected devices beyond its own replica that one token is sent to, which picks its experts evenly.

    A device with E / D of E experts has none of the k picked with C(E - E/D, k) / C(E, k).
    """
    each = experts // parallel.expert
    missed = math.prod((experts - each - i) / (experts - i) for i in range(experts_per_token))
    return (parallel.devices - parallel.tensor) * (1 - missed)


def most_loaded(distinct: Array, experts: int, devices: int) -> Array:
    """Distinct experts on the device that has most of them, of `distinct` in all among `experts`.

    Each of a device's experts / devices is hit with q = distinct / experts, so that the count there has the mean
    distinct / devices and the variance experts / devices * q (1 - q); the largest of D such counts lies about
    sqrt(2 ln D) deviations above the mean.
    """
    if devices == 1:
        return distinct
    hit = distinct / experts
    spread = np.sqrt(experts / devices * hit * (1 - hit) * 2 * math.log(devices))
    return np.minimum(np.minimum(distinct / devices + spread, experts / devices), distinct)
