"""The samplers by name: each is one file with `step(decode) -> committed tokens per sequence`, and one line here."""

from __future__ import annotations

from collections.abc import Callable

from runtime.samplers import autoregressive, denoising, single_forward, two_forward
from runtime.samplers.state import Decode

SAMPLERS: dict[str, Callable[[Decode], list[list[int]]]] = {
    "autoregressive": autoregressive.step,
    "two_forward": two_forward.step,
    "single_forward": single_forward.step,
    "denoising": denoising.step,
}
