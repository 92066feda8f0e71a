"""The search space as data: what may be set, in which range, under which condition, and what it means.

A setting is a `Candidate` (decoding and kernels) to everyone but the search library, which sees named parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from runtime.config import EXPERT_MODES, DecodingConfig, KernelConfig, require

MAX_DRAFT_TOKENS = 24
LEAST_MIXING_WEIGHT = 0.25
_ANY_TOKENS = max(KernelConfig().experts)  # the bucket of a prefill, whose mode is not tuned

Value = str | bool | int | float


class Candidate(NamedTuple):
    """One setting to run."""

    decoding: DecodingConfig
    kernels: KernelConfig


class Suggests(Protocol):
    """The part of an Optuna trial that a space draws from."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float) -> float: ...


@dataclass(frozen=True)
class Parameter:
    """One thing to set: a choice, or a number from low to high in steps. `when`: only if another has that value."""

    name: str
    kind: Literal["choice", "integer", "real"]
    meaning: str
    choices: tuple[str | bool, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 1.0
    when: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.kind == "choice":
            require(len(self.choices) > 0, f"parameter {self.name} must have at least one choice")
        else:
            require(self.low <= self.high, f"low <= high must hold for {self.name}, but got {self.low} and {self.high}")
            require(self.step > 0, f"step > 0 must hold for {self.name}, but got {self.step}")

    def values(self) -> tuple[Value, ...]:
        """Every value, in order."""
        if self.kind == "choice":
            return self.choices
        steps = range(round((self.high - self.low) / self.step) + 1)
        return tuple(self._number(self.low + i * self.step) for i in steps)

    def suggest(self, trial: Suggests) -> Value:
        """Ask the search for a value."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.name, list(self.choices))  # type: ignore[no-any-return]
        if self.kind == "integer":
            return trial.suggest_int(self.name, int(self.low), int(self.high))
        return self._number(trial.suggest_float(self.name, self.low, self.high, step=self.step))

    def _number(self, value: float) -> Value:
        """Free of the rounding that steps accumulate, so that equal settings are equal."""
        return int(value) if self.kind == "integer" else round(value, 6)


@dataclass(frozen=True)
class Space:
    """Parameters in the order they are drawn, for one batch size: it decides how many tokens a forward holds."""

    batch: int
    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        names: set[str] = set()
        for parameter in self.parameters:
            if parameter.when is not None:
                require(
                    parameter.when[0] in names,
                    f"parameter {parameter.name} depends on {parameter.when[0]}, which must come before it",
                )
            require(parameter.name not in names, f"parameter {parameter.name} is given twice")
            names.add(parameter.name)

    def suggest(self, trial: Suggests) -> Candidate:
        """Draw a candidate."""
        params: dict[str, Value] = {}
        for parameter in self.parameters:
            if _active(parameter, params):
                params[parameter.name] = parameter.suggest(trial)
        return self.candidate(params)

    def candidate(self, params: Mapping[str, Value]) -> Candidate:
        """The setting that parameter values stand for; what a space does not hold keeps its default."""
        given: dict[str, Any] = dict(params)
        block = given["sampler"] != "autoregressive"
        chosen = {n: given[n] for n in ("draft_tokens", "anchor_draft", "mixing_weight") if n in given}
        if "mixing_weight" in chosen:
            chosen["mixing_weight"] = round(chosen["mixing_weight"], 6)
        decoding = DecodingConfig(given["sampler"], **chosen)
        mode = given["experts_block" if block else "experts_single"]
        tokens = self.batch * decoding.slots
        prefill = KernelConfig().experts[_ANY_TOKENS]
        return Candidate(decoding, KernelConfig({tokens: mode, _ANY_TOKENS: prefill}, given["threads"]))

    def encode(self, candidate: Candidate) -> dict[str, Value]:
        """The parameter values of a setting, for enqueueing. UserError when the space does not hold it."""
        decoding, kernels = candidate
        mode = kernels.expert_mode(self.batch * decoding.slots)
        values: dict[str, Any] = {
            "sampler": decoding.sampler,
            "draft_tokens": decoding.draft_tokens,
            "anchor_draft": decoding.anchor_draft,
            "mixing_weight": decoding.mixing_weight,
            "experts_single": mode,
            "experts_block": mode,
            "threads": kernels.threads,
        }
        params: dict[str, Value] = {}
        for parameter in self.parameters:
            if _active(parameter, params):
                value = values[parameter.name]
                require(
                    value in parameter.values(),
                    f"{parameter.name} must be one of {', '.join(map(str, parameter.values()))}, but is {value}",
                )
                params[parameter.name] = value
        require(
            self.candidate(params).decoding == decoding, f"the space must hold the setting, but it lacks {decoding}"
        )
        return params

    def key(self, candidate: Candidate) -> str:
        """A name that equal settings share, however they were proposed."""
        return json.dumps(self.encode(candidate), sort_keys=True)

    def grid(self, coarse: Mapping[str, tuple[Value, ...]] | None = None) -> list[Candidate]:
        """Every setting; `coarse` replaces the values of a parameter by a few of them."""
        points: list[dict[str, Value]] = [{}]
        for parameter in self.parameters:
            values = (coarse or {}).get(parameter.name, parameter.values())
            points = [
                extended
                for point in points
                for extended in (
                    [{**point, parameter.name: value} for value in values] if _active(parameter, point) else [point]
                )
            ]
        return [self.candidate(point) for point in points]


def _active(parameter: Parameter, params: Mapping[str, Value]) -> bool:
    return parameter.when is None or params.get(parameter.when[0]) == parameter.when[1]


def decoding_space(*, batch: int, cores: int, drafts: bool = True, lossless: bool = False) -> Space:
    """What can be set on a CPU. drafts: whether the model can draft; lossless: hold the mixing weight at 1.

    How the experts run is the CPU's counterpart of a kernel's tiling; it is set for the token count that the sampler
    sends: batch for the autoregressive one, batch * (K + 1) for a block. Prefill keeps its default.
    """
    require(batch >= 1, f"batch >= 1 must hold, but got {batch}")
    block = ("sampler", "two_forward")
    samplers: tuple[str | bool, ...] = ("autoregressive", "two_forward") if drafts else ("autoregressive",)
    modes: tuple[str | bool, ...] = EXPERT_MODES
    parameters = [
        Parameter("sampler", "choice", "how tokens are produced", samplers),
        Parameter(
            "experts_single", "choice", "how one token's expert is run", modes, when=("sampler", "autoregressive")
        ),
        Parameter("threads", "integer", "threads of a matmul", low=1, high=cores),
    ]
    if drafts:
        parameters += [
            Parameter("draft_tokens", "integer", "drafts per step, K", low=1, high=MAX_DRAFT_TOKENS, when=block),
            Parameter("anchor_draft", "choice", "first draft from the anchor's own logits", (False, True), when=block),
            Parameter("experts_block", "choice", "how a block's experts are run", modes, when=block),
        ]
    if drafts and not lossless:
        parameters.append(
            Parameter(
                "mixing_weight",
                "real",
                "share of the autoregressive logits in the target; 1 is lossless",
                low=LEAST_MIXING_WEIGHT,
                high=1.0,
                step=0.05,
                when=block,
            )
        )
    return Space(batch, tuple(parameters))


def default_candidate(space: Space, threads: int) -> Candidate:
    """What runs untuned: autoregressive decoding, the kernels' default, the process's thread count."""
    kernels = KernelConfig()
    mode = kernels.expert_mode(space.batch)
    return space.candidate({"sampler": "autoregressive", "experts_single": mode, "threads": threads})
