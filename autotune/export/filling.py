"""How plain block diffusion fills a block, as the engines that do it can be told."""

from __future__ import annotations

from typing import NamedTuple

from autotune.export.policy import Chosen, refusal


class Filling(NamedTuple):
    """A block of masks: a forward decides the `share` surest ones, and all that reach the threshold (None: none do)."""

    block: int
    share: int
    threshold: float | None

    @property
    def forwards(self) -> int:
        """The most that fill a block."""
        return -(-self.block // self.share)


def filling_of(target: str, chosen: Chosen) -> Filling:
    """That of a setting, in its simplest form; UserError for a sampler or a temperature that these engines lack."""
    decoding = chosen.decoding
    if decoding.sampler != "denoising":
        raise refusal(target, chosen, "sampler", decoding.sampler, "only denoising fills blocks without judging them")
    if decoding.verify:
        raise refusal(target, chosen, "verify", True, "nothing verifies a block there")
    if decoding.temperature > 0:
        why = "sure tokens are found at temperature 1 and drawn at another; there both are one, or the likeliest wins"
        raise refusal(target, chosen, "temperature", decoding.temperature, why)
    block, threshold = decoding.draft_tokens, decoding.confidence_threshold
    share = block if threshold == 0 else -(-block // decoding.denoising_steps)
    return Filling(block, share, None if share == block else threshold)
