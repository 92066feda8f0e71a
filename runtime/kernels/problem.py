"""What a kernel is tried on: a model's sizes, the sequences of one forward, and how its slots lie. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from runtime.config import ModelConfig, replace, require

VERIFIED_SLOTS = 17  # of the default DecodingConfig: the anchor and 16 drafts


@dataclass(frozen=True)
class Problem:
    """One forward of `batch` x `slots` tokens over up to `context` cached ones.

    kind: causal slots (decode, verify), [anchor, masks] (draft), or single_forward with `levels`, whose slots are then
    (K + 1) * (1 + len(levels)). Where the config's first layer slides, so does the problem's.
    """

    config: ModelConfig
    batch: int = 1
    slots: int = 1
    context: int = 1024
    kind: Literal["causal", "draft", "single"] = "causal"
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.batch >= 1, f"batch >= 1 must hold, but got {self.batch}")
        require(self.slots >= 1, f"slots >= 1 must hold, but got {self.slots}")
        require(self.context >= 0, f"context >= 0 must hold, but got {self.context}")
        width = 1 + len(self.levels)
        require(
            self.kind != "single" or (len(self.levels) > 0 and self.slots % width == 0),
            f"slots must be a multiple of 1 + levels = {width} in a single_forward problem, but are {self.slots}",
        )

    @property
    def tokens(self) -> int:
        """Tokens of the forward, all sequences together."""
        return self.batch * self.slots

    @property
    def window(self) -> int | None:
        """Of the first layer's attention; None: everything is seen."""
        return self.config.sliding_window if self.config.layer_types[0] == "hybrid_sliding" else None

    def __str__(self) -> str:
        window = "" if self.window is None else f", window {self.window}"
        return (
            f"{self.kind} {self.batch} x {self.slots}, context {self.context}{window}, hidden {self.config.hidden_size}"
        )


def problem_of(tokens: int, config: ModelConfig, context: int = 1024) -> Problem:
    """A usual forward of so many tokens: multiples of 17 are sequences of 17 verified slots, others decode one each."""
    slots = VERIFIED_SLOTS if tokens % VERIFIED_SLOTS == 0 else 1
    return Problem(config, tokens // slots, slots, context)


# No size is a power of two but head_dim, which tl.arange and RoPE want so; three query heads share a KV head.
ODD = ModelConfig(
    vocab_size=1003,
    hidden_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=5,
    moe_intermediate_size=48,
    router_hidden_size=24,
    max_position_embeddings=512,
    mask_token_id=3,
)
SLIDING = replace(ODD, layer_types=("hybrid_sliding", "hybrid_sliding"), sliding_window=7)
ODD_PROBLEMS = (
    Problem(ODD, 1, 1, 11),
    Problem(ODD, 3, 1, 37),
    Problem(ODD, 3, 5, 20),
    Problem(replace(ODD, cca_time1=3), 2, 2, 9),
    Problem(ODD, 1, 17, 19, "draft"),
    Problem(ODD, 2, 9, 23, "single", (0, 2)),
    Problem(SLIDING, 3, 5, 40),
    Problem(ODD, 3, 17, 33),
)


def full_problems(config: ModelConfig, context: int = 1024) -> Iterable[Problem]:
    """What an engine meets: decoding, drafts and their verification at several batches, and single_forward."""
    yield Problem(config, 1, 1, context)
    yield Problem(config, 16, 1, context)
    yield Problem(config, 1, VERIFIED_SLOTS, context)
    yield Problem(config, 16, VERIFIED_SLOTS, context)
    yield Problem(config, 16, VERIFIED_SLOTS, context, "draft")
    levels = (0, 4, 7, 11)
    yield Problem(config, 4, VERIFIED_SLOTS * (1 + len(levels)), context, "single", levels)
    yield Problem(config, 128, VERIFIED_SLOTS, context)
