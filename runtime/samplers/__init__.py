"""The samplers by name: each is one file with `step(decode) -> Step`, and one line here."""

from __future__ import annotations

from collections.abc import Callable

from runtime.config import DecodingConfig
from runtime.samplers import autoregressive, denoising, single_forward, two_forward
from runtime.samplers.state import Decode, Step, finish

SAMPLERS: dict[str, Callable[[Decode], Step]] = {
    "autoregressive": autoregressive.step,
    "two_forward": two_forward.step,
    "single_forward": single_forward.step,
    "denoising": denoising.step,
}


def advance(decode: Decode) -> list[list[int]]:
    """Run one step of the decode's sampler, and read it: the committed tokens per sequence."""
    return finish(decode, SAMPLERS[decode.decoding.sampler](decode))


def capturable(decoding: DecodingConfig) -> bool:
    """Whether a step neither reads the device nor follows lists of the host, so that a graph can replay it."""
    return decoding.sampler != "denoising" or (decoding.verify and decoding.confidence_threshold is None)


def reads_draft_logits(decoding: DecodingConfig) -> bool:
    """Whether a verification reads the logits that drafts were drawn from; else only their tokens matter."""
    warm = decoding.draft_temperature > 0 or (decoding.anchor_draft and decoding.temperature > 0)
    return decoding.drafts and (decoding.mixing_weight != 1 or (warm and decoding.temperature > 0))
