"""Which experts forwards chose, as facts that the performance model reads. Torch-free.

A sequence's routes do not depend on its neighbours in a batch, so that the forwards of any smaller batch can be counted
from the routes of N sequences: by taking them in groups.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hardware.files import UserError, build, plain, read_json, write_atomic
from runtime.config import require
from runtime.measurement import ForwardKind

Format = Literal["ridgepoint-routing-1"]
FORMAT: Format = "ridgepoint-routing-1"
Routes: TypeAlias = npt.NDArray[np.int64]  # [layers, sequences, slots], the expert chosen; `experts` is the skip expert
_PARTITIONS = 8  # random ways to take the sequences in groups
_DRAWS = 200  # of the bootstrap over sequences


@dataclass(frozen=True)
class RoutingPoint:
    """Distinct experts of a layer in a forward of batch x slots tokens; the skip expert does not count."""

    kind: ForwardKind
    batch: int
    slots: int
    forwards: int  # disjoint groups of sequences; each of these was counted in several random groupings
    distinct: float  # mean over forwards and layers
    low: float  # 95% interval of `distinct` for other sequences, normal, from the spread and the disjoint forwards
    high: float
    spread: float  # standard deviation between forwards, of the mean over layers
    per_layer: tuple[float, ...]  # mean over forwards

    @property
    def tokens(self) -> int:
        """Tokens in flight."""
        return self.batch * self.slots


@dataclass(frozen=True)
class BlockFacts:
    """What the tokens of one kind of forward chose, over all sequences.

    correlation, rho: the probability beyond chance that two tokens of one block choose the same expert, 0 for
    independent choices and 1 for equal ones: (P(same) - c) / (1 - c). P(same) is the share of pairs of different slots
    of a block that chose the same expert, among pairs that both chose a real one; chance c = sum over experts of the
    square of its share of all real choices. None for one slot.
    """

    kind: ForwardKind
    slots: int
    sequences: int
    skip_share: float  # of tokens routed to the skip expert, mean over layers
    correlation: float | None  # mean over layers
    low: float | None  # 95% bootstrap interval over sequences
    high: float | None
    correlation_per_layer: tuple[float, ...]
    load: tuple[tuple[float, ...], ...]  # per layer, each expert's share of the tokens, the skip expert's last


@dataclass(frozen=True)
class HeldOut:
    """How far a named coverage is from what other prompts recorded at other batches and slots, in experts."""

    coverage: str
    kind: ForwardKind
    points: int
    mean_absolute_error: float
    largest_error: float


@dataclass(frozen=True)
class RoutingFacts:
    """What the runtime recorded of one model, and where it came from.

    `fitted_rho` is, per kind, the rho of the coverage `correlated(rho)` that is closest to the points.
    """

    format: Format
    model: str
    model_hash: str
    command: str
    commit: str
    date: str
    layers: int
    experts: int
    points: tuple[RoutingPoint, ...]
    blocks: tuple[BlockFacts, ...]
    fitted_rho: dict[str, float]
    held_out: tuple[HeldOut, ...]

    def __post_init__(self) -> None:
        require(len(self.points) > 0, "routing facts must have at least one point")
        seen = set()
        for p in self.points:
            name = f"{p.kind} of {p.batch} x {p.slots}"
            require(name not in seen, f"a point must be recorded once, but {name} is there twice")
            seen.add(name)
            require(p.batch >= 1 and p.slots >= 1, f"batch >= 1 and slots >= 1 must hold, but got {name}")
            most = min(self.experts, p.tokens)
            require(
                0 <= p.distinct <= most + 1e-9,
                f"0 <= distinct experts <= min(experts, tokens) = {most} must hold, but {name} has {p.distinct}",
            )
            require(
                len(p.per_layer) == self.layers,
                f"per_layer must have {self.layers} entries, but {name} has {len(p.per_layer)}",
            )
        for b in self.blocks:
            require(
                0 <= b.skip_share < 1, f"0 <= skip_share < 1 must hold, but {b.kind} of {b.slots} has {b.skip_share}"
            )

    def skip_share(self, kind: str, slots: int) -> float:
        """The recorded share of tokens that skip; UserError where this block was not recorded."""
        for b in self.blocks:
            if (b.kind, b.slots) == (kind, slots):
                return b.skip_share
        raise UserError(f"these routing facts have points of {kind} with {slots} slots, but nothing of its blocks")


def read_routing(path: Path) -> RoutingFacts:
    """Read facts strictly: unknown and missing keys, another format, and impossible numbers raise UserError."""
    data: dict[str, Any] = read_json(path)
    return build(RoutingFacts, data, str(path))


def write_routing(facts: RoutingFacts, path: Path) -> Path:
    """One line of JSON per point and block, renamed into place."""
    return write_atomic(path, routing_json(facts) + "\n")


def routing_json(facts: RoutingFacts) -> str:
    """The document, an entry of its lists per line."""
    parts = []
    for key, value in plain(facts).items():
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            parts.append(f" {json.dumps(key)}: [\n{lines}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def distinct_experts(routes: npt.ArrayLike, experts: int) -> npt.NDArray[np.int64]:
    """Distinct real experts of each row: int64 [..., tokens] -> int64 [...]."""
    chosen = np.asarray(routes)
    hit = np.zeros((*chosen.shape[:-1], experts + 1), dtype=bool)
    np.put_along_axis(hit, chosen, True, axis=-1)
    return hit[..., :experts].sum(-1)


def point_of(kind: ForwardKind, routes: Routes, batch: int, experts: int, *, seed: int = 0) -> RoutingPoint:
    """Count the forwards of `batch` sequences that the N recorded ones make up, in several random groupings.

    Raises UserError for fewer than two such forwards: one says nothing of the spread.
    """
    layers, sequences, slots = routes.shape
    forwards = sequences // batch
    require(forwards >= 2, f"a batch of {batch} needs routes of at least {2 * batch} sequences, but got {sequences}")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(1 if batch == 1 else _PARTITIONS):
        order = rng.permutation(sequences)[: forwards * batch]
        groups = routes[:, order].reshape(layers, forwards, batch * slots)
        found.append(distinct_experts(groups, experts))
    counted = np.concatenate(found, axis=1)  # [layers, forwards]
    spread = float(counted.mean(0).std())
    mean, half = float(counted.mean()), 1.96 * spread / forwards**0.5
    return RoutingPoint(
        kind,
        batch,
        slots,
        forwards,
        _rounded(mean),
        _rounded(mean - half),
        _rounded(mean + half),
        _rounded(spread),
        tuple(_rounded(float(v)) for v in counted.mean(1)),
    )


def block_of(kind: ForwardKind, routes: Routes, experts: int, *, seed: int = 0) -> BlockFacts:
    """Loads, skips and the correlation within a block (defined at `BlockFacts`)."""
    sequences, slots = routes.shape[1:]
    counts = np.stack([(routes == e).sum(-1) for e in range(experts + 1)], axis=-1)  # [layers, sequences, classes]
    load = counts.sum(1) / (sequences * slots)
    rho: tuple[float, ...] = ()
    low = high = mean = None
    if slots > 1:
        found = _correlation(counts[..., :experts])
        rho, mean = tuple(_rounded(float(v)) for v in found), _rounded(float(found.mean()))
        rng = np.random.default_rng(seed)
        draws = [
            float(_correlation(counts[:, rng.integers(0, sequences, sequences), :experts]).mean())
            for _ in range(_DRAWS)
        ]
        low, high = (_rounded(float(v)) for v in np.quantile(draws, [0.025, 0.975]))
    shares = tuple(tuple(_rounded(float(v)) for v in layer) for layer in load)
    return BlockFacts(kind, slots, sequences, _rounded(float(load[:, -1].mean())), mean, low, high, rho, shares)


def _correlation(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """rho of each layer from the real choices per block and expert, [layers, sequences, experts]."""
    total = counts.sum(-1)  # real choices per block
    same = (counts * (counts - 1)).sum((1, 2)) / np.maximum(1, (total * (total - 1)).sum(1))
    share = counts.sum(1) / np.maximum(1, total.sum(1))[:, None]
    chance = (share**2).sum(-1)
    return np.where(chance < 1, (same - chance) / np.where(chance < 1, 1 - chance, 1), 0.0)


def batches_of(sequences: int, largest: int) -> Sequence[int]:
    """1, 2, 4 ... up to `largest`, as far as the sequences make up two forwards."""
    return [b for b in (2**i for i in range(32)) if b <= min(largest, sequences // 2)]


def _rounded(value: float) -> float:
    return round(value, 5)
