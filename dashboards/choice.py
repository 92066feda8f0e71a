"""The operating point that Explore shows, and the answers. Streamlit-free, torch-free."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np

from hardware.files import UserError, known
from hardware.profile import HardwareProfile, list_profiles, load_profile
from perfmodel.acceptance import judged
from perfmodel.breakeven import SamplerMap, break_even
from perfmodel.cli_options import dtype_of, precision_of
from perfmodel.contenders import Acceptance, Contender
from perfmodel.decoding import Setting, predict, setting
from perfmodel.engine import list_engines, load_engine
from perfmodel.explain import Explanation, explain
from perfmodel.known_acceptance import list_acceptances, load_acceptance
from perfmodel.model_spec import known_models, load_spec, require_context
from perfmodel.parallel import Parallel
from perfmodel.precision import STORED_BYTES
from perfmodel.prediction import Prediction
from perfmodel.steps import step_of
from perfmodel.sweep import Sweep, sweep
from runtime.config import DTYPE_BYTES, DecodingConfig, Workload, require

BATCHES = tuple(2**n for n in range(10))
LINE_CONTEXTS, MAP_CONTEXTS = 12, 8  # powers of two of the context, up to the model's longest
DEFAULT = "default"
DTYPES = (DEFAULT, *DTYPE_BYTES)
STORED = (DEFAULT, *STORED_BYTES)
NARROWED = ("weights", "expert_weights", "activations", "cache_dtype")  # what may be stored, or multiplied, in another
DENSE = "dense"
DEFAULT_ENGINE = "default"
GIVEN = "length"  # the acceptance is a length that is given


@dataclass(frozen=True)
class Choice:
    """One operating point on some devices.

    dtype "default": as `ridgepoint predict` has it, bfloat16 on a GPU (what is published quantised stays so) and
    float32 on a CPU; engine "default": ours there.
    weights, expert_weights, activations, cache_dtype: what is not in the dtype, "default" as `ridgepoint predict` has
    it. tensor_parallel, expert_parallel: devices of one node. Those of experts count for models that have some.
    levels: "dense", or single_forward's proposal levels with commas. acceptance: "length" (`acceptance_length`
    counts), or a known acceptance. mixing_weight: w; it changes no time. What a sampler does not use is kept for when
    another is chosen. Only known names are taken, never paths: an address that somebody sends must not make the server
    read a file.
    """

    devices: tuple[str, ...] = ("h100-sxm", "mi300x")
    model: str = "zaya1-8b"
    batch: int = 1
    context: int = 2048
    sampler: str = "two_forward"
    draft_tokens: int = 16
    levels: str = DENSE
    denoising_steps: int = 1
    verify: bool = False
    acceptance_length: float = 6.8
    dtype: str = "default"
    engine: str = DEFAULT_ENGINE
    acceptance: str = GIVEN
    mixing_weight: float = 1.0
    weights: str = DEFAULT
    expert_weights: str = DEFAULT
    activations: str = DEFAULT
    cache_dtype: str = DEFAULT
    tensor_parallel: int = 1
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        require(len(self.devices) >= 1, "at least one device must be chosen")
        for kind, names, options in (
            ("hardware", self.devices, list_profiles()),
            ("model", (self.model,), known_models()),
            ("dtype", (self.dtype,), DTYPES),
            ("engine", (self.engine,), (DEFAULT_ENGINE, *list_engines())),
            ("acceptance", (self.acceptance,), (GIVEN, *list_acceptances())),
            ("dtype", (getattr(self, name) for name in NARROWED), STORED),
        ):
            for name in names:
                if name not in options:
                    raise known(kind, name, options)
        require(self.context >= 1, f"context >= 1 must hold, but got {self.context}")
        Workload(batch=self.batch)
        require_context(load_spec(self.model), self.context + int(np.max(step_of(self.decoding).reach)))
        require(self.denoising_steps >= 1, f"denoising_steps >= 1 must hold, but got {self.denoising_steps}")
        Parallel(self.tensor_parallel, self.expert_parallel)
        require(0 <= self.mixing_weight <= 1, f"0 <= mixing_weight <= 1 must hold, but got {self.mixing_weight}")
        self.accepted.checked(self.decoding)
        require(1 <= self.acceptance_length < math.inf, "the acceptance length must be a number >= 1")

    @property
    def decoding(self) -> DecodingConfig:
        """The settings whose step is predicted."""
        used: dict[str, Any] = {}
        if self.sampler == "single_forward":
            used = {"proposal_levels": _levels(self.levels)}
        elif self.sampler == "denoising":
            used = {"denoising_steps": self.denoising_steps, "verify": self.verify}
        chosen = DecodingConfig(self.sampler, self.draft_tokens, **used)  # type: ignore[arg-type]
        return replace(chosen, mixing_weight=self.mixing_weight) if judged(chosen) else chosen

    @property
    def accepted(self) -> Acceptance:
        """What is known of how many drafts are accepted; nothing where none are judged."""
        if not judged(self.decoding):
            return Acceptance()
        if self.acceptance == GIVEN:
            return Acceptance(length=self.acceptance_length)
        return Acceptance(known=load_acceptance(self.acceptance))

    @property
    def has_experts(self) -> bool:
        """Whether the model has experts, whose settings are else kept for another one."""
        return load_spec(self.model).num_experts > 0

    @property
    def narrowed(self) -> dict[str, str]:
        """What is chosen of NARROWED for this model."""
        chosen = {name: getattr(self, name) for name in NARROWED if name != "expert_weights" or self.has_experts}
        return {name: dtype for name, dtype in chosen.items() if dtype != DEFAULT}

    @property
    def parallel(self) -> Parallel:
        """How the model is divided over devices."""
        return Parallel(self.tensor_parallel, self.expert_parallel if self.has_experts else 1)

    def on(self, device: str) -> Choice:
        """The same on one device: what is computed for it stays known when another device is chosen too."""
        return replace(self, devices=(device,))


SECTIONS = ("speedup", "map", "step", "changes")


@dataclass(frozen=True)
class View(Choice):
    """A choice and what the page shows of it. map_device: whose map; "" stands for the first device."""

    section: str = SECTIONS[0]
    map_device: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.section not in SECTIONS:
            raise known("section", self.section, SECTIONS)
        if self.map_device not in ("", *self.devices):
            raise known("map_device", self.map_device, self.devices)

    @property
    def choice(self) -> Choice:
        """The operating point alone: what is computed for it stays known when another section is shown."""
        return Choice(**{f.name: getattr(self, f.name) for f in fields(Choice)})


@cache
def engine_kinds() -> dict[str, str]:
    """The kind of hardware that each bundled engine runs on."""
    return {name: load_engine(name).hardware_kind for name in list_engines()}


def engines_of(devices: Sequence[str], chosen: str = DEFAULT_ENGINE) -> list[str]:
    """What a user chooses from: the default, the engines that run on one of the devices, and what is chosen already."""
    kinds = set()
    for name in devices:
        with suppress(UserError):  # said where the device is asked for its answer
            kinds.add(load_profile(name).kind)
    fitting = [name for name, kind in engine_kinds().items() if kind in kinds or name == chosen]
    return [DEFAULT_ENGINE, *fitting]


def acceptances_of(sampler: str, chosen: str = GIVEN) -> list[str]:
    """What a user chooses from: a length, what is known of the sampler, and what is chosen already."""
    known_of = {name: load_acceptance(name) for name in list_acceptances()}
    fitting = [name for name, a in known_of.items() if a.rates or sampler in a.lengths or name == chosen]
    return [GIVEN, *fitting]


def _levels(text: str) -> tuple[int, ...] | None:
    if text == DENSE:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"levels must be {DENSE} or numbers with commas between them, but are {text!r}") from error


@dataclass(frozen=True)
class Answer:
    """One device's answer: the step with the chosen sampler, the autoregressive step, and speedups over two axes."""

    chosen: Prediction
    autoregressive: Prediction
    speedups: Sweep | None  # over the batch; None for an autoregressive choice
    by_context: Sweep | None = None

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The autoregressive step first, then the chosen one where it is another."""
        return (self.autoregressive, self.chosen) if self.chosen.decoding.drafts else (self.autoregressive,)


def answer(choice: Choice, hardware: HardwareProfile) -> Answer:
    """Predict a choice on one of its devices. UserError where it cannot run: memory, dtype, acceptance, context."""
    spec, decoding, at = load_spec(choice.model), choice.decoding, _setting(choice, hardware)
    known_form = choice.accepted.of(decoding)
    same: dict[str, Any] = {"context": choice.context, "engine": at.engine, "precision": at.precision}
    same["parallel"] = at.parallel
    element: Any = dtype_of(_dtype(choice), hardware)
    workload = Workload(batch=choice.batch, prompt_tokens=choice.context, dtype=element)
    single = predict(spec, hardware, workload, decoding.autoregressive, **same)
    if not decoding.drafts:
        return Answer(single, single, None)
    chosen = predict(
        spec, hardware, workload, decoding, acceptance_length=known_form.length, histogram=known_form.histogram, **same
    )
    settings: dict[str, Any] = {
        "draft_tokens": [choice.draft_tokens],
        "acceptance_length": chosen.acceptance_length,
    }
    return Answer(
        chosen,
        single,
        sweep(at, decoding, batch=sorted({*BATCHES, choice.batch}), context=[choice.context], **settings),
        sweep(at, decoding, batch=[choice.batch], context=contexts_of(choice, LINE_CONTEXTS), **settings),
    )


def pays_map(choice: Choice, hardware: HardwareProfile) -> SamplerMap:
    """Where the chosen setting pays on one device, by batch and context. UserError for autoregressive decoding."""
    decoding = choice.decoding
    require(decoding.drafts, "autoregressive decoding is what a break-even map compares with")
    contender = Contender(decoding, choice.accepted.tokens(decoding))
    batches = sorted({*BATCHES, choice.batch})
    return break_even(_setting(choice, hardware), [contender], batches, contexts_of(choice, MAP_CONTEXTS))


def explanation(choice: Choice, hardware: HardwareProfile) -> Explanation:
    """What would change the chosen point most on one device. UserError as for `answer`."""
    at = _setting(choice, hardware)
    return explain(at, choice.decoding, choice.accepted, batch=choice.batch, context=choice.context)


def contexts_of(choice: Choice, count: int) -> list[int]:
    """The chosen context and the `count` largest powers of two that the model reads with it."""
    most = load_spec(choice.model).max_context - int(np.max(step_of(choice.decoding).reach))
    powers = [2**n for n in range(most.bit_length()) if 2**n <= most]
    return sorted({*powers[-count:], choice.context})


def predict_command(choice: Choice, device: str) -> str:
    """The command that predicts the choice on one of its devices, as a shell line."""
    decoding = choice.decoding
    options: dict[str, object] = {
        "model": choice.model,
        "hardware": device,
        "batch": choice.batch,
        "context": choice.context,
        "sampler": choice.sampler,
    }
    if decoding.drafts:
        options["draft-tokens"] = choice.draft_tokens
    if judged(decoding):
        known_name = choice.acceptance != GIVEN
        options["acceptance" if known_name else "acceptance-length"] = (
            choice.acceptance if known_name else choice.acceptance_length
        )
    if decoding.proposal_levels is not None:
        options["levels"] = ",".join(map(str, decoding.proposal_levels))
    if choice.sampler == "denoising":
        options["steps"] = choice.denoising_steps
    if decoding.mixing_weight != 1:
        options["mixing-weight"] = choice.mixing_weight
    if choice.dtype != DEFAULT:
        options["dtype"] = choice.dtype
    options |= {name.replace("_", "-"): dtype for name, dtype in choice.narrowed.items()}
    for name, devices in (("tensor", choice.parallel.tensor), ("expert", choice.parallel.expert)):
        if devices > 1:
            options[f"{name}-parallel"] = devices
    if choice.engine != DEFAULT_ENGINE:
        options["engine"] = choice.engine
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return shlex.join(["ridgepoint", "predict", *words, *["--verify"] * decoding.verify])


def _dtype(choice: Choice) -> str | None:
    return None if choice.dtype == DEFAULT else choice.dtype


def _setting(choice: Choice, hardware: HardwareProfile) -> Setting:
    engine = None if choice.engine == DEFAULT_ENGINE else choice.engine
    narrowed = choice.narrowed
    stored = [narrowed.get(name) for name in NARROWED]
    precision = precision_of(choice.model, _dtype(choice), hardware, *stored)
    return setting(load_spec(choice.model), hardware, precision, engine=engine, parallel=choice.parallel)
