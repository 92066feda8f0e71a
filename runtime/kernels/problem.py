"""What a kernel is tried on: a model's sizes, the sequences of one forward, and how its slots lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.config import ModelConfig


@dataclass(frozen=True)
class Problem:
    """One forward of `batch` x `slots` tokens over up to `context` cached ones.

    kind: causal slots (decode, verify), [anchor, masks] (draft), or single_forward with `levels`, whose slots are then
    (K + 1) * (1 + len(levels)).
    """

    config: ModelConfig
    batch: int = 1
    slots: int = 1
    context: int = 1024
    kind: Literal["causal", "draft", "single"] = "causal"
    levels: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the forward, all sequences together."""
        return self.batch * self.slots
