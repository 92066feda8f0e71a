"""What a page shows, as data: the chosen point, its address in the URL, and the answers. Streamlit-free, torch-free."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hardware.files import UserError, known
from hardware.profile import HardwareProfile, list_profiles
from perfmodel.acceptance import tokens_per_step
from perfmodel.decoding import predict, setting
from perfmodel.model_spec import known_models, load_spec, require_context
from perfmodel.prediction import Prediction
from perfmodel.sweep import Sweep, sweep
from runtime.config import DTYPE_BYTES, DecodingConfig, Sampler, Workload, replace, require

BATCHES = tuple(2**n for n in range(10))
DTYPES = ("default", *DTYPE_BYTES)
SAMPLERS: tuple[str, ...] = typing.get_args(Sampler)


@dataclass(frozen=True)
class Choice:
    """One operating point on some devices. dtype "default" is bfloat16 on a GPU and float32 on a CPU.

    Only known names are taken, never paths: an address that somebody sends must not make the server read a file.
    """

    devices: tuple[str, ...] = ("h100-sxm", "mi300x")
    model: str = "zaya1-8b"
    batch: int = 1
    context: int = 2048
    sampler: str = "two_forward"
    draft_tokens: int = 16
    acceptance_length: float = 6.8
    dtype: str = "default"

    def __post_init__(self) -> None:
        require(len(self.devices) >= 1, "at least one device must be chosen")
        for kind, names, options in (
            ("hardware", self.devices, list_profiles()),
            ("model", (self.model,), known_models()),
            ("dtype", (self.dtype,), DTYPES),
        ):
            for name in names:
                if name not in options:
                    raise known(kind, name, options)
        require(self.context >= 1, f"context >= 1 must hold, but got {self.context}")
        Workload(batch=self.batch)
        require_context(load_spec(self.model), self.context + self.decoding.slots)
        if self.decoding.sampler == "autoregressive":  # kept for when drafting is chosen again
            require(1 <= self.acceptance_length < math.inf, "the acceptance length must be a number >= 1")
        else:
            tokens_per_step(self.decoding, length=self.acceptance_length)

    @property
    def decoding(self) -> DecodingConfig:
        """The settings whose step is predicted."""
        return DecodingConfig(sampler=self.sampler, draft_tokens=self.draft_tokens)  # type: ignore[arg-type]

    def query(self) -> dict[str, list[str]]:
        """The parameters of the address that shows this choice."""
        return {f.name: _texts(getattr(self, f.name)) for f in dataclasses.fields(self)}


def choice_from_query(parameters: Mapping[str, Sequence[str]]) -> Choice:
    """The choice in an address; what it leaves out has its default. UserError: unknown keys and impossible values."""
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Choice)}
    values: dict[str, Any] = {}
    for key, texts in parameters.items():
        if key not in defaults:
            raise known("parameter of the address", key, defaults)
        if key == "devices":
            values[key] = tuple(texts)
            continue
        require(len(texts) == 1, f"{key} must be given once in the address, but is given {len(texts)} times")
        try:
            values[key] = type(defaults[key])(texts[0])
        except ValueError as error:
            raise UserError(f"{key} must be a {type(defaults[key]).__name__}, but is {texts[0]!r}") from error
    return Choice(**values)


def _texts(value: Any) -> list[str]:
    return list(value) if isinstance(value, tuple) else [str(value)]


@dataclass(frozen=True)
class Answer:
    """One device's answer: the step with the chosen sampler, the autoregressive step, and speedups over the batch."""

    chosen: Prediction
    autoregressive: Prediction
    speedups: Sweep | None  # None for an autoregressive choice

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The autoregressive step first, then the chosen one where it is another."""
        drafting = self.chosen.decoding.sampler != "autoregressive"
        return (self.autoregressive, self.chosen) if drafting else (self.autoregressive,)


def answer(choice: Choice, hardware: HardwareProfile) -> Answer:
    """Predict a choice on one of its devices. UserError where it cannot run: memory, dtype, acceptance, context."""
    spec = load_spec(choice.model)
    dtype: Any = choice.dtype
    if dtype == "default":
        dtype = "float32" if hardware.kind == "cpu" else "bfloat16"
    workload = Workload(batch=choice.batch, prompt_tokens=choice.context, dtype=dtype)
    plain = replace(choice.decoding, sampler="autoregressive")
    single = predict(spec, hardware, workload, plain, context=choice.context)
    if choice.sampler == "autoregressive":
        return Answer(single, single, None)
    length = choice.acceptance_length
    chosen = predict(spec, hardware, workload, choice.decoding, context=choice.context, acceptance_length=length)
    speedups = sweep(
        setting(spec, hardware, dtype),
        choice.decoding,
        batch=sorted({*BATCHES, choice.batch}),
        context=[choice.context],
        draft_tokens=[choice.draft_tokens],
        acceptance_length=length,
    )
    return Answer(chosen, single, speedups)
