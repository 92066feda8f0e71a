"""How a runtime spends time beyond its kernels' own work, as data: launches, passes over activations, efficiencies."""

from __future__ import annotations

import importlib.resources
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hardware.files import UserError, build, known, plain, read_yaml, write_atomic
from hardware.profile import HardwareProfile
from perfmodel.operators import FORWARD_OPERATORS
from perfmodel.steps import WORK_ENTRIES
from runtime.config import EXPERT_MODES, KernelConfig, require

Parameter = Literal["dispatch", "matmul", "attention", "cache", "activations"]
PARAMETERS: tuple[Parameter, ...] = ("dispatch", "matmul", "attention", "cache", "activations")


@dataclass(frozen=True)
class OperatorHost:
    """What an engine does for one operator (per layer, or per forward for embedding and LM head).

    launches: kernels; views: operators that move nothing but cost host time. passes: how often the activations of the
    operator's fused form are moved by separate kernels, over what its matmuls themselves move. weight_passes: how
    often a copying kernel moves a token's weights.
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
class EngineProfile:
    """A runtime on a kind of hardware. `sources` says of each group of figures: counted, fitted or assumed.

    host: synchronous (a CPU: every operator waits for the one before), eager (the host launches ahead of the device,
    so the slower of the two sets the time) or graph (launches are replayed by the device).
    overlap: whether an operator's memory traffic hides behind its arithmetic (one fused kernel) or adds to it.
    scale: what calibration changes, 1 = the profile's own figure. dispatch multiplies the host's seconds per launch;
    matmul, attention, cache and activations multiply the achieved rates of matmuls, of attention's arithmetic, of
    reading the KV cache and of moving activations.
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

    def __post_init__(self) -> None:
        wanted = set(FORWARD_OPERATORS) - {"experts"}
        require(
            set(self.operators) == wanted,
            f"operators must be exactly {', '.join(sorted(wanted))}, but are {', '.join(sorted(self.operators))}",
        )
        for name in self.sampler:
            if name not in WORK_ENTRIES:
                raise known("entry of sampler", name, WORK_ENTRIES)
        require("autoregressive" in self.sampler, "sampler must describe autoregressive, the baseline of every other")
        for mode in self.experts:
            if mode not in EXPERT_MODES:
                raise known("expert mode", mode, EXPERT_MODES)
        for mode in self.kernels.experts.values():
            require(mode in self.experts, f"experts must describe the mode {mode!r} of the default kernels")
        require(0 <= self.view_share <= 1, f"0 <= view_share <= 1 must hold, but got {self.view_share}")
        for name, value in self.scale.items():
            require(0 < value < math.inf, f"scale.{name} > 0 must hold, but got {value}")
        groups = {"operators", "experts", "sampler", "view_share", "scale"}
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

    def scale_of(self, parameter: Parameter) -> float:
        """The calibrated factor, 1 where none was fitted."""
        return self.scale.get(parameter, 1.0)


def _folder() -> Path:
    return Path(str(importlib.resources.files("perfmodel") / "engines"))


def list_engines() -> dict[str, Path]:
    """The bundled engines by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.yaml"))}


def load_engine(name_or_path: str | Path) -> EngineProfile:
    """An engine by name, or from a path that ends in .yaml or .yml. UserError for unknown names and broken rules."""
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
    else:
        engines = list_engines()
        if text not in engines:
            raise known("engine", text, engines)
        path = engines[text]
    return build(EngineProfile, read_yaml(path), str(path))


def engine_for(hardware: HardwareProfile, engine: EngineProfile | str | None) -> EngineProfile:
    """The engine for a device: the given one, or ours. UserError if it cannot run there, or was fitted elsewhere."""
    if engine is None:
        engine = "ridgepoint-cpu" if hardware.kind == "cpu" else "ridgepoint-eager"
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
