"""The search space as data: what may be set, in which range, under which condition, and what it means.

A setting is a `Candidate` (decoding and kernels) to everyone but the search library, which sees named parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

from runtime.config import ENGINES, EXPERT_MODES, SAMPLER_NAMES, DecodingConfig, Engine, KernelConfig, require
from runtime.levels import optimal

MAX_DRAFT_TOKENS = 24
LEAST_MIXING_WEIGHT = 0.25
DENSE = "dense"  # as many proposal levels as a block has acceptance counts
NO_THRESHOLD = "none"
_ANY_TOKENS = max(KernelConfig().experts)  # the bucket of a prefill, whose mode is not tuned

Value = str | bool | int | float


class Candidate(NamedTuple):
    """One setting to run."""

    decoding: DecodingConfig
    kernels: KernelConfig


class Suggests(Protocol):
    """The part of an Optuna trial that a space draws from."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float) -> float: ...


@dataclass(frozen=True)
class Parameter:
    """One thing to set: a choice, or a number from low to high in steps.

    when: only if another parameter, named first, has one of the values that follow.
    """

    name: str
    kind: Literal["choice", "integer", "real"]
    meaning: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 1.0
    when: tuple[Value, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind == "choice":
            require(len(self.choices) > 0, f"parameter {self.name} must have at least one choice")
        else:
            require(self.low <= self.high, f"low <= high must hold for {self.name}, but got {self.low} and {self.high}")
            require(self.step > 0, f"step > 0 must hold for {self.name}, but got {self.step}")
            steps = (self.high - self.low) / self.step
            require(
                abs(steps - round(steps)) < 1e-6,
                f"{self.name} must reach high = {self.high} from low = {self.low} in steps of {self.step}",
            )

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
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step))
        return self._number(trial.suggest_float(self.name, self.low, self.high, step=self.step))

    def describe(self) -> dict[str, str]:
        """A row for people: name, kind, values, condition, meaning."""
        values = self.values()
        if self.kind == "choice":
            shown = ", ".join(map(_word, values))
        else:
            shown = f"{_word(values[0])} to {_word(values[-1])}"
            shown += f" in steps of {self.step:g}" if self.step != 1 else ""
        condition = "" if self.when is None else f"{self.when[0]} is {' or '.join(map(_word, self.when[1:]))}"
        return {
            "name": self.name,
            "kind": self.kind,
            "values": shown,
            "condition": condition,
            "meaning": self.meaning,
        }

    def _number(self, value: float) -> Value:
        """Free of the rounding that steps accumulate, so that equal settings are equal."""
        return int(value) if self.kind == "integer" else round(value, 6)


@dataclass(frozen=True)
class Space:
    """Parameters in the order they are drawn, for one batch size: it decides how many tokens a forward holds.

    histogram: steps that accepted 0, 1, 2 ... fresh drafts, if that was recorded before: proposal levels are then
    chosen from it.
    """

    batch: int
    parameters: tuple[Parameter, ...]
    histogram: tuple[float, ...] = ()

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

    def describe(self) -> list[dict[str, str]]:
        """A row per parameter: name, kind, values, condition, meaning."""
        return [parameter.describe() for parameter in self.parameters]

    def size(self) -> int:
        """How many distinct settings it holds."""
        return len(self.grid())

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
        chosen: dict[str, Any] = {
            n: given[n] for n in ("draft_tokens", "anchor_draft", "mixing_weight", "verify") if n in given
        }
        if "mixing_weight" in chosen:
            chosen["mixing_weight"] = round(chosen["mixing_weight"], 6)
        if "levels_count" in given:
            chosen["proposal_levels"] = self.levels(given["levels_count"], given["draft_tokens"])
        if "denoising_steps" in given:
            chosen["denoising_steps"] = min(given["denoising_steps"], given["draft_tokens"])
            threshold = given.get("confidence_threshold", NO_THRESHOLD)
            if threshold != NO_THRESHOLD and chosen["denoising_steps"] > 1:  # one step decides every token anyway
                chosen["confidence_threshold"] = threshold
        decoding = DecodingConfig(given["sampler"], **chosen)
        mode = given["experts_block" if decoding.drafts else "experts_single"]
        if mode in ENGINES:
            return Candidate(decoding, KernelConfig(threads=given.get("threads"), engine=mode))
        tokens = self.batch * decoding.slots
        prefill = KernelConfig().experts[_ANY_TOKENS]
        return Candidate(decoding, KernelConfig({tokens: mode, _ANY_TOKENS: prefill}, given.get("threads")))

    def complete(self, params: Mapping[str, Value]) -> bool:
        """Whether every parameter that applies has a value; those of a trial that was ended while it was drawn lack."""
        return all(p.name in params for p in self.parameters if _active(p, params))

    def levels(self, count: Value, draft_tokens: int) -> tuple[int, ...] | None:
        """The proposal levels that a `levels_count` stands for; None: all of them, as also for a count beyond K.

        The best ones by the recorded histogram, else evenly spaced: i (K + 1) / count, rounded down, for i < count.
        """
        if count == DENSE or int(count) > draft_tokens:
            return None
        if not self.histogram:
            return tuple(i * (draft_tokens + 1) // int(count) for i in range(int(count)))
        return _best_levels(tuple(self.histogram), draft_tokens, int(count))

    def encode(self, candidate: Candidate) -> dict[str, Value]:
        """The parameter values of a setting, for enqueueing. UserError when the space does not hold it."""
        decoding, kernels = candidate
        fused = kernels.engine != "eager"
        mode = kernels.engine if fused else kernels.expert_mode(self.batch * decoding.slots)
        values: dict[str, Any] = {
            "sampler": decoding.sampler,
            "draft_tokens": decoding.draft_tokens,
            "anchor_draft": decoding.anchor_draft,
            "levels_count": self._first("levels_count", decoding, "proposal_levels"),
            "denoising_steps": self._first("denoising_steps", decoding, "denoising_steps"),
            "confidence_threshold": decoding.confidence_threshold or NO_THRESHOLD,
            "verify": decoding.verify,
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

    def _first(self, name: str, decoding: DecodingConfig, setting: str) -> Value | None:
        """Of the values that mean the same at this K, the first, so that equal settings have equal parameters."""
        for parameter in self.parameters:
            if parameter.name == name:
                for value in parameter.values():
                    k = decoding.draft_tokens
                    meant = self.levels(value, k) if name == "levels_count" else min(int(value), k)
                    if meant == getattr(decoding, setting):
                        return value
        return None

    def key(self, candidate: Candidate) -> str:
        """A name that equal settings share, however they were proposed."""
        return json.dumps(self.encode(candidate), sort_keys=True)

    def grid(self, coarse: Mapping[str, tuple[Value, ...]] | None = None) -> list[Candidate]:
        """Every setting, once; `coarse` replaces the values of a parameter by a few of them."""
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
        found: dict[object, Candidate] = {}
        for decoding, kernels in map(self.candidate, points):
            known = decoding, tuple(kernels.experts.items()), kernels.threads, kernels.engine
            found.setdefault(known, Candidate(decoding, kernels))
        return list(found.values())


def shortened(histogram: Sequence[float], draft_tokens: int) -> list[float]:
    """The histogram of K drafts from that of more, a shorter draft being the beginning of a longer one."""
    counts = [float(c) for c in histogram]
    kept = counts[:draft_tokens]
    return [*kept, *[0.0] * (draft_tokens - len(kept)), sum(counts[draft_tokens:])]


@lru_cache(maxsize=4096)  # asked for again by every setting that a search looks at
def _best_levels(histogram: tuple[float, ...], draft_tokens: int, count: int) -> tuple[int, ...]:
    return optimal(shortened(histogram, draft_tokens), count)


def _word(value: Value) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _active(parameter: Parameter, params: Mapping[str, Value]) -> bool:
    if parameter.when is None:
        return True
    name, *values = parameter.when
    return str(name) in params and params[str(name)] in values


def decoding_space(
    *,
    batch: int,
    cores: int | None,
    drafts: bool = True,
    lossless: bool = False,
    histogram: Sequence[float] = (),
    engine: Engine = "eager",
) -> Space:
    """What can be set. drafts: whether the model can draft; lossless: only what gives the model's own tokens.

    cores: of a CPU; None: a GPU, which has no threads to set. One space serves every effort: a longer search goes on
    in the study of a shorter one.
    histogram: see `Space`. How the experts run is the CPU's counterpart of a kernel's tiling; it is set for the most
    tokens that the sampler sends at once. Prefill keeps its default. Denoising is verified with w = 1, or not at all.
    engine: the device's default one; unless it is eager, it is a choice beside the modes of the eager one.
    """
    require(batch >= 1, f"batch >= 1 must hold, but got {batch}")
    samplers = SAMPLER_NAMES if drafts else SAMPLER_NAMES[:1]
    modes: tuple[Value, ...] = EXPERT_MODES if engine == "eager" else (engine, *EXPERT_MODES)
    parameters = [
        Parameter("sampler", "choice", "how tokens are produced", samplers),
        Parameter(
            "experts_single",
            "choice",
            "how one token's expert is run, or the engine",
            modes,
            when=("sampler", "autoregressive"),
        ),
    ]
    if cores is not None:
        parameters.append(Parameter("threads", "integer", "threads of a matmul", low=1, high=cores))
    return Space(batch, (*parameters, *(_drafting(samplers[1:], modes, lossless) if drafts else ())), tuple(histogram))


def _drafting(samplers: tuple[str, ...], modes: tuple[Value, ...], lossless: bool) -> list[Parameter]:
    """What is set where tokens are drafted."""
    two, single, denoising = (("sampler", name) for name in ("two_forward", "single_forward", "denoising"))
    block = ("sampler", *samplers)
    steps: tuple[Value, ...] = (1, 2, 4, 8)
    found = [
        Parameter("draft_tokens", "integer", "drafts per step, K", low=1, high=MAX_DRAFT_TOKENS, when=block),
        Parameter("anchor_draft", "choice", "first draft from the anchor's own logits", (False, True), when=two),
        Parameter("levels_count", "choice", "acceptance counts drafted ahead for", (1, 2, 4, 8, DENSE), when=single),
        Parameter("denoising_steps", "choice", "most forwards that fill a block, up to K", steps, when=denoising),
        Parameter(
            "confidence_threshold",
            "choice",
            "probability from which a token is decided early",
            (NO_THRESHOLD, 0.9, 0.7),
            when=("denoising_steps", *steps[1:]),
        ),
        Parameter("verify", "choice", "verify the block", (True,) if lossless else (False, True), when=denoising),
        Parameter("experts_block", "choice", "how a block's experts are run, or the engine", modes, when=block),
    ]
    if not lossless:
        found.append(
            Parameter(
                "mixing_weight",
                "real",
                "share of the autoregressive logits in the target; 1 is lossless",
                low=LEAST_MIXING_WEIGHT,
                high=1.0,
                step=0.05,
                when=("sampler", "two_forward", "single_forward"),
            )
        )
    return found


def default_candidate(space: Space, threads: int | None) -> Candidate:
    """What runs untuned: autoregressive decoding, the device's engine, the kernels' default, the process's threads.

    threads: not looked at where the space has none.
    """
    (choice,) = (p for p in space.parameters if p.name == "experts_single")
    engines = [value for value in choice.choices if value in ENGINES]
    mode = engines[0] if engines else KernelConfig().expert_mode(space.batch)
    params: dict[str, Value] = {"sampler": "autoregressive", "experts_single": mode}
    if threads is not None and any(p.name == "threads" for p in space.parameters):
        params["threads"] = threads
    return space.candidate(params)
