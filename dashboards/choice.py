"""The operating point that Explore shows, and the answers. Streamlit-free, torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from hardware.files import UserError, known
from hardware.profile import HardwareProfile, list_profiles, load_profile
from perfmodel.acceptance import judged, tokens_per_step
from perfmodel.decoding import predict, setting
from perfmodel.engine import list_engines, load_engine
from perfmodel.model_spec import known_models, load_spec, require_context
from perfmodel.prediction import Prediction
from perfmodel.steps import step_of
from perfmodel.sweep import Sweep, sweep
from runtime.config import DTYPE_BYTES, DecodingConfig, Workload, require

BATCHES = tuple(2**n for n in range(10))
DTYPES = ("default", *DTYPE_BYTES)
DENSE = "dense"
DEFAULT_ENGINE = "default"


@dataclass(frozen=True)
class Choice:
    """One operating point on some devices. dtype "default" is bfloat16 on a GPU and float32 on a CPU, engine
    "default" ours there.

    levels: "dense", or single_forward's proposal levels with commas. What a sampler does not use is kept for when
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

    def __post_init__(self) -> None:
        require(len(self.devices) >= 1, "at least one device must be chosen")
        for kind, names, options in (
            ("hardware", self.devices, list_profiles()),
            ("model", (self.model,), known_models()),
            ("dtype", (self.dtype,), DTYPES),
            ("engine", (self.engine,), (DEFAULT_ENGINE, *list_engines())),
        ):
            for name in names:
                if name not in options:
                    raise known(kind, name, options)
        require(self.context >= 1, f"context >= 1 must hold, but got {self.context}")
        Workload(batch=self.batch)
        require_context(load_spec(self.model), self.context + int(np.max(step_of(self.decoding).reach)))
        require(self.denoising_steps >= 1, f"denoising_steps >= 1 must hold, but got {self.denoising_steps}")
        tokens_per_step(self.decoding, length=self.length)
        require(1 <= self.acceptance_length < math.inf, "the acceptance length must be a number >= 1")

    @property
    def decoding(self) -> DecodingConfig:
        """The settings whose step is predicted."""
        used: dict[str, Any] = {}
        if self.sampler == "single_forward":
            used = {"proposal_levels": _levels(self.levels)}
        elif self.sampler == "denoising":
            used = {"denoising_steps": self.denoising_steps, "verify": self.verify}
        return DecodingConfig(self.sampler, self.draft_tokens, **used)  # type: ignore[arg-type]

    @property
    def length(self) -> float | None:
        """The acceptance length, where the sampler has one."""
        return self.acceptance_length if judged(self.decoding) else None


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


def _levels(text: str) -> tuple[int, ...] | None:
    if text == DENSE:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"levels must be {DENSE} or numbers with commas between them, but are {text!r}") from error


@dataclass(frozen=True)
class Answer:
    """One device's answer: the step with the chosen sampler, the autoregressive step, and speedups over the batch."""

    chosen: Prediction
    autoregressive: Prediction
    speedups: Sweep | None  # None for an autoregressive choice

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The autoregressive step first, then the chosen one where it is another."""
        return (self.autoregressive, self.chosen) if self.chosen.decoding.drafts else (self.autoregressive,)


def answer(choice: Choice, hardware: HardwareProfile) -> Answer:
    """Predict a choice on one of its devices. UserError where it cannot run: memory, dtype, acceptance, context."""
    spec = load_spec(choice.model)
    dtype: Any = choice.dtype
    if dtype == "default":
        dtype = "float32" if hardware.kind == "cpu" else "bfloat16"
    workload = Workload(batch=choice.batch, prompt_tokens=choice.context, dtype=dtype)
    engine = None if choice.engine == DEFAULT_ENGINE else choice.engine
    single = predict(spec, hardware, workload, choice.decoding.autoregressive, context=choice.context, engine=engine)
    if not choice.decoding.drafts:
        return Answer(single, single, None)
    chosen = predict(
        spec, hardware, workload, choice.decoding, context=choice.context, acceptance_length=choice.length,
        engine=engine,
    )  # fmt: skip
    speedups = sweep(
        setting(spec, hardware, dtype, engine=engine),
        choice.decoding,
        batch=sorted({*BATCHES, choice.batch}),
        context=[choice.context],
        draft_tokens=[choice.draft_tokens],
        acceptance_length=chosen.acceptance_length,
    )
    return Answer(chosen, single, speedups)
