"""How a runtime spends time beyond its kernels' own work, as data: launches, passes over activations, efficiencies."""

from __future__ import annotations

import importlib.resources
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from hardware.files import UserError, build, known, plain, read_yaml, write_atomic
from hardware.profile import HardwareProfile
from perfmodel.experts import parse_coverage
from perfmodel.kernels.library import Family
from perfmodel.operators import FORWARD_OPERATORS
from perfmodel.steps import FORWARDS, WORK_ENTRIES
from runtime.config import EXPERT_MODES, Engine, KernelConfig, require

Parameter = Literal["dispatch", "matmul", "weights", "attention", "cache", "activations"]
PARAMETERS: tuple[Parameter, ...] = ("dispatch", "matmul", "weights", "attention", "cache", "activations")
# The engines of our own runtime, by kind of device and the `KernelConfig.engine` that they describe.
OURS: dict[tuple[str, Engine], str] = {
    ("cpu", "lean"): "ridgepoint-lean",
    ("cpu", "eager"): "ridgepoint-cpu",
    ("gpu", "graphs"): "ridgepoint-graphs",
    ("gpu", "eager"): "ridgepoint-eager",
}
DESCRIBED = tuple(name for name in FORWARD_OPERATORS if name not in ("experts", "collective"))
DEFAULT = "default"  # the host costs of devices that have none of their own


@dataclass(frozen=True)
class OperatorHost:
    """What an engine does for one operator (per layer, or per forward for embedding and LM head).

    launches: kernels; views: operators that move nothing but cost host time. passes: how often the activations of the
    operator's fused form are moved by separate kernels, over what its matmuls (or the library's attention and expert
    kernels) themselves move. weight_passes: how often a copying kernel moves a token's weights.
    """

    launches: float
    views: float = 0.0
    passes: float = 0.0
    launches_per_expert: float = 0.0
    views_per_expert: float = 0.0
    weight_passes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("launches", "views", "passes", "launches_per_expert", "views_per_expert", "weight_passes"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} >= 0 must hold, but got {value}")


@dataclass(frozen=True)
class Fit:
    """Where fitted scales came from: the device's profile, the rows, and the error they were left with."""

    hardware: str
    source: str
    date: str
    median_absolute_error: float
    points: tuple[str, ...]  # `validation.point_name` of every row that was fitted to


@dataclass(frozen=True)
class HostCosts:
    """What an engine adds on one device to the kernels' own time. Nothing of it overlaps with them.

    forward_seconds: every forward, whatever its size; `forwards` has those of kinds of forwards (as in
    `perfmodel.steps`) that cost something else. layer_seconds: every layer of a forward (small kernels that are not
    described). step_seconds: every decoding step beyond its forwards. sequence_seconds: every sequence of a step.
    token_seconds: every slot of a forward. drawn_logit_seconds: every logit a token is drawn from (a sort).
    exchange_seconds: every layer whose experts are dealt out over replicas, which wait for each other there;
    exchange_token_seconds: and every token of all replicas in such a layer.
    cached_token_seconds: every cached token of one sequence where it has several slots, by an attention kernel that
    does not split the cache: whatever the batch, one after the other. families: factors on the kernel library's time,
    by family; 1 if not named.
    """

    forward_seconds: float = 0.0
    layer_seconds: float = 0.0
    step_seconds: float = 0.0
    sequence_seconds: float = 0.0
    token_seconds: float = 0.0
    drawn_logit_seconds: float = 0.0
    exchange_seconds: float = 0.0
    exchange_token_seconds: float = 0.0
    cached_token_seconds: float = 0.0
    forwards: dict[str, float] = field(default_factory=dict)
    families: dict[Family, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _HOST_SECONDS:
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} >= 0 must hold, but got {value}")
        for kind, value in self.forwards.items():
            if kind not in FORWARDS:
                raise known("kind of forward", kind, FORWARDS)
            require(0 <= value < math.inf, f"forwards.{kind} >= 0 must hold, but got {value}")
        for family, value in self.families.items():
            require(0 < value < math.inf, f"families.{family} > 0 must hold, but got {value}")

    def forward(self, kind: str) -> float:
        """Seconds of every forward of a kind, whatever its size."""
        return self.forwards.get(kind, self.forward_seconds)

    def factor(self, family: Family) -> float:
        """Over the library's time of a family."""
        return self.families.get(family, 1.0)


_HOST_SECONDS = tuple(f.name for f in fields(HostCosts) if f.name.endswith("_seconds"))


@dataclass(frozen=True)
class Requests:
    """How the requests of a batch that is not kept full differ, as coefficients of variation.

    steps: of the steps that requests of one length take, their drafts being accepted unevenly; untold_steps: the same
    where the model answers without thinking aloud. lengths: of lengths, where a sequence may end early.
    admission_forwards: how many forwards the other sequences wait for when one is admitted.
    """

    steps: float = 0.0
    untold_steps: float = 0.0
    lengths: float = 0.0
    admission_forwards: float = 0.0

    def __post_init__(self) -> None:
        for name, value in plain(self).items():
            require(0 <= value < math.inf, f"requests.{name} >= 0 must hold, but got {value}")


@dataclass(frozen=True)
class EngineProfile:
    """A runtime on a kind of hardware. `sources` says of each group of figures: counted, fitted or assumed.

    host: synchronous (a CPU: every operator waits for the one before), eager (the host launches ahead of the device,
    so the slower of the two sets the time) or graph (launches are replayed by the device).
    overlap: whether an operator's memory traffic hides behind its arithmetic (one fused kernel) or adds to it.
    scale: what calibration changes, 1 = the profile's own figure. dispatch multiplies the host's seconds per launch;
    matmul, attention, cache and activations multiply the achieved rates of matmuls, of attention's arithmetic, of
    reading the KV cache and of moving activations; weights that of reading weights, of engines with a row_tile.
    row_tile: rows that the engine's own matmuls take at once; they take the longer of reading their weights and of
    their arithmetic, where several rows cost no less than a tile. None: its matmuls are those that a probe measures.
    hosts: by device, vendor or "default", the most specific one alone counts. intervals: 90% intervals of fitted host
    costs, as "h100-sxm.forward_seconds". spread: 80% of measured steps that no fit had seen lie within the estimate
    times or over exp(spread); None: that of the kernels. spreads: the same for steps of a kind, where enough were
    measured: those that begin with a forward of this name, or of "moe" or "dense" models. builds: of the engine, by
    commit, that take another time for forwards of several slots: their factor on what `hosts` says every such forward
    costs.
    """

    name: str
    hardware_kind: Literal["cpu", "gpu"]
    host: Literal["synchronous", "eager", "graph"]
    overlap: bool
    operators: dict[str, OperatorHost]
    experts: dict[str, OperatorHost]  # by KernelConfig's expert mode
    sampler: dict[str, OperatorHost]  # by the parts of `perfmodel.steps`; "_sampled" where tokens are drawn
    kernels: KernelConfig  # the default of a prediction that names none
    view_share: float  # host seconds of a view over those of a launch
    sources: dict[str, str]
    scale: dict[Parameter, float] = field(default_factory=dict)
    fit: Fit | None = None
    hosts: dict[str, HostCosts] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    spread: float | None = None
    spreads: dict[str, float] = field(default_factory=dict)
    requests: Requests | None = None  # None: not known
    builds: dict[str, float] = field(default_factory=dict)
    expert_coverage: str = "uniform"  # of a prediction that names none: that under which the engine was fitted
    row_tile: int | None = None

    def __post_init__(self) -> None:
        parse_coverage(self.expert_coverage)
        require(
            self.host != "synchronous" or self.hardware_kind == "cpu",
            f"host must be eager or graph on a gpu, which does not wait after each operator, but is {self.host}",
        )
        for name in self.operators:
            if name not in DESCRIBED:
                raise known("entry of operators", name, DESCRIBED)
        for name in self.sampler:
            if name not in WORK_ENTRIES:
                raise known("entry of sampler", name, WORK_ENTRIES)
        require("autoregressive" in self.sampler, "sampler must describe autoregressive, the baseline of every other")
        for mode in self.experts:
            if mode not in EXPERT_MODES:
                raise known("expert mode", mode, EXPERT_MODES)
        for mode in self.kernels.experts.values():
            require(mode in self.experts, f"experts must describe the mode {mode!r} of the default kernels")
        require(self.row_tile is None or self.row_tile >= 1, f"row_tile >= 1 must hold, but got {self.row_tile}")
        require(0 <= self.view_share <= 1, f"0 <= view_share <= 1 must hold, but got {self.view_share}")
        for name, value in self.scale.items():
            require(0 < value < math.inf, f"scale.{name} > 0 must hold, but got {value}")
        require(self.spread is None or self.spread >= 0, f"spread >= 0 must hold, but got {self.spread}")
        for name, value in self.spreads.items():
            if name not in (*FORWARDS, "moe", "dense"):
                raise known("kind of spreads", name, (*FORWARDS, "moe", "dense"))
            require(value >= 0, f"spreads.{name} >= 0 must hold, but got {value}")
        for name, (low, high) in self.intervals.items():
            require(low <= high, f"intervals.{name} must be [low, high], but is [{low}, {high}]")
        groups = {"operators", "experts", "sampler", "view_share", "scale"} | ({"hosts"} if self.hosts else set())
        groups |= {"requests"} if self.requests else set()
        for name, value in self.builds.items():
            require(0 < value < math.inf, f"builds.{name} > 0 must hold, but got {value}")
        require(
            set(self.sources) == groups,
            f"sources must be for exactly {', '.join(sorted(groups))}, but are for {', '.join(sorted(self.sources))}",
        )

    def work(self, entry: str) -> OperatorHost:
        """A part of a sampler's own work. UserError where an engine, of an earlier fit for example, lacks it."""
        if entry not in self.sampler:
            raise UserError(
                f"engine {self.name} does not describe {entry}: its sampler has {', '.join(sorted(self.sampler))}"
            )
        return self.sampler[entry]

    def operator(self, name: str) -> OperatorHost:
        """What the engine does for an operator of a forward. UserError where it runs no model that has it."""
        if name not in self.operators:
            raise UserError(
                f"engine {self.name} does not describe {name}: its operators are {', '.join(sorted(self.operators))}"
            )
        return self.operators[name]

    def host_costs(self, hardware: HardwareProfile) -> HostCosts:
        """What the engine adds on a device: its own figures, else its vendor's, else the default, else nothing."""
        for name in (hardware.name, hardware.vendor, DEFAULT):
            if name in self.hosts:
                return self.hosts[name]
        return HostCosts()

    def of_build(self, commit: str) -> EngineProfile:
        """The engine as it was in a build: this one unless `builds` says how it differs."""
        factor = self.builds.get(commit)
        if factor is None:
            return self
        hosts = {}
        for name, costs in self.hosts.items():
            forwards = {kind: factor * costs.forward(kind) for kind in FORWARDS if kind != "decode"}
            hosts[name] = replace(costs, forwards={**costs.forwards, **forwards})
        return replace(self, hosts=hosts)

    @property
    def known_spread(self) -> float | None:
        """The spread of whole steps; of an engine calibrated on one device, that which its median error means.

        The 0.8 quantile of normal errors is 1.9 times their median.
        """
        if self.spread is None and self.fit is not None:
            return 1.9 * self.fit.median_absolute_error
        return self.spread

    def spread_of(self, *kinds: str) -> float | None:
        """The spread of the first of these kinds that has one of its own, else that of all steps."""
        return next((self.spreads[kind] for kind in kinds if kind in self.spreads), self.known_spread)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The scales that calibration can tell apart."""
        return tuple(p for p in PARAMETERS if p != "weights" or self.row_tile)

    def scale_of(self, parameter: Parameter) -> float:
        """The calibrated factor, 1 where none was fitted."""
        return self.scale.get(parameter, 1.0)


def _folder() -> Path:
    return Path(str(importlib.resources.files("perfmodel") / "engines"))


def list_engines() -> dict[str, Path]:
    """The bundled engines by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.yaml"))}


def load_engine(name_or_path: str | Path) -> EngineProfile:
    """An engine by name, or from a path that ends in .yaml or .yml. UserError for unknown names and broken rules.

    A file may say `like: NAME` of a bundled engine: what it does not give is that engine's, entry by entry.
    """
    path = _path(str(name_or_path))
    return build(EngineProfile, _resolved(path, ()), str(path))


def _path(text: str) -> Path:
    if text.endswith((".yaml", ".yml")):
        return Path(text)
    engines = list_engines()
    if text not in engines:
        raise known("engine", text, engines)
    return engines[text]


def _resolved(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's data over those of the engine that it is like."""
    data = read_yaml(path)
    base = data.pop("like", None)
    if base is None:
        return data
    engines = list_engines()
    if not isinstance(base, str) or base not in engines:
        raise known(f"engine that {path} is like:", str(base), engines)
    above = engines[base]
    require(above not in (*seen, path), f"{path}: an engine cannot be like itself")
    return _over(_resolved(above, (*seen, path)), data)


def _over(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """`data` over `base`: mappings of mappings (and of texts and numbers) entry by entry, all else as a whole."""
    found = dict(base)
    for key, value in data.items():
        below = base.get(key)
        if key in _MERGED and isinstance(value, dict) and isinstance(below, dict):
            value = {**below, **value}
        found[key] = value
    return found


_MERGED = ("operators", "experts", "sampler", "sources", "scale", "hosts", "intervals")


def engine_for(
    hardware: HardwareProfile, engine: EngineProfile | str | None, ran: Engine | None = None
) -> EngineProfile:
    """The engine for a device: the given one, or ours. UserError if it cannot run there, or was fitted elsewhere.

    ran: the engine of our runtime that forwards ran with; None: its default on such a device.
    """
    if engine is None:
        ours = ran or ("lean" if hardware.kind == "cpu" else "graphs")
        described = [name for kind, name in OURS if kind == hardware.kind]
        if ours not in described:
            raise known(f"described engine of a {hardware.kind}", ours, described)
        engine = OURS[hardware.kind, ours]
    found = load_engine(engine) if isinstance(engine, str) else engine
    if found.hardware_kind != hardware.kind:
        fitting = sorted(name for name in list_engines() if load_engine(name).hardware_kind == hardware.kind)
        raise UserError(
            f"engine {found.name} runs on a {found.hardware_kind}, but {hardware.name} is a {hardware.kind}; "
            f"for it: {', '.join(fitting)}"
        )
    require(
        found.fit is None or found.fit.hardware == hardware.name,
        f"engine {found.name} was fitted on {found.fit.hardware if found.fit else ''}, not on {hardware.name}",
    )
    return found


def save_engine(engine: EngineProfile, path: str | Path) -> Path:
    """Write an engine as YAML that `load_engine` reads back equal."""
    data: dict[str, Any] = plain(engine)
    return write_atomic(path, yaml.safe_dump(data, sort_keys=False, width=120))
