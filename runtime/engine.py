"""Generation: all prompts in one closed batch, or on fewer slots that are refilled as sequences finish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.batching import Batcher, FinishReason, Request, Served
from runtime.config import DecodingConfig, KernelConfig, require
from runtime.model.zaya import Zaya
from runtime.policy import Settings, using
from runtime.samplers.state import ForwardCounter, TraceStep

OnTokens = Callable[[int, list[int], FinishReason | None], None]


@dataclass(frozen=True)
class GenerationResult:
    """New tokens per prompt (a stop token is the last one), and what producing them took."""

    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    served: list[Served]  # the settings that decoded and for how many steps, in the order of the deployment's rules
    batching: Literal["closed", "continuous"]
    steps: list[int]  # decoding steps each sequence took part in
    acceptance_histogram: list[int]  # entry n: steps of a sequence that committed n + 1 tokens, cut ones too
    counters: dict[str, ForwardCounter]  # by kind of forward: "decode", "draft", "verify", "single", "settle"
    prefill_seconds: float  # admissions of a continuous batch included
    decode_seconds: float
    full_tokens: int  # committed in steps that had a sequence in every slot
    full_seconds: float  # of those steps

    @property
    def decoding(self) -> DecodingConfig:
        """The settings that decoded the most steps."""
        return max(self.served, key=lambda served: served.steps).decoding

    @property
    def kernels(self) -> KernelConfig:
        """What was in use in those steps."""
        return max(self.served, key=lambda served: served.steps).kernels

    @property
    def forwards(self) -> int:
        """Decoding forwards; the prefill's are not counted."""
        return sum(c.forwards for c in self.counters.values())

    @property
    def slots(self) -> int:
        """Token slots of those forwards, all sequences together."""
        return sum(c.slots for c in self.counters.values())

    @property
    def acceptance_length(self) -> float:
        """Mean tokens committed per step of a sequence."""
        return sum(map(len, self.tokens)) / max(1, sum(self.steps))

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens per decoding forward of the batch."""
        return sum(map(len, self.tokens)) / max(1, self.forwards)

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second of decoding, all sequences together, the drain included."""
        return sum(map(len, self.tokens)) / self.decode_seconds

    @property
    def full_tokens_per_second(self) -> float | None:
        """The same over the steps with a sequence in every slot; None when there were none."""
        return self.full_tokens / self.full_seconds if self.full_seconds else None


def generate(
    model: Zaya,
    prompts: Sequence[Sequence[int]],
    decoding: Settings,
    *,
    max_new_tokens: int | Sequence[int],
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    batch: int | None = None,
    ignore_mismatch: bool = False,
    on_tokens: OnTokens | None = None,
    trace: list[TraceStep] | None = None,
) -> GenerationResult:
    """Continue each prompt by up to `max_new_tokens` tokens (one limit, or one per prompt).

    decoding: the settings, or a tuned deployment (or its path), whose rule for the active sequences and their
        longest context is followed from step to step; its kernel settings hold for this call only.
    stop_tokens: end a sequence; by default the model's end-of-sequence tokens.
    batch: slots. None, or as many as prompts: a closed batch, which drains as sequences finish. Fewer: continuous
        batching, a finished sequence's slot goes to the next prompt.
    ignore_mismatch: follow a deployment of another model or device, too.
    on_tokens: called with a prompt's index, its new tokens and why it ended (or None), as soon as they exist.
    trace: filled with every step's logits.

    With fixed settings a sequence's output depends on the seed and its index, not on its neighbours; a deployment's
    rule follows the batch, and sampled text with it. Raises UserError for empty prompts, unknown tokens, lengths
    beyond the context, and a cache that does not fit in memory.
    """
    require(len(prompts) >= 1, "at least one prompt must be given")
    require(batch is None or batch >= 1, f"batch >= 1 must hold, but got {batch}")
    require(seed >= 0, f"seed >= 0 must hold, but got {seed}")
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    require(len(limits) == len(prompts), f"one max_new_tokens per prompt must be given, but got {len(limits)}")
    stops = model.config.stop_token_ids if stop_tokens is None else tuple(stop_tokens)
    slots = min(batch or len(prompts), len(prompts))
    context = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    outputs: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length"] * len(prompts)
    steps, histogram = [0] * len(prompts), Counter[int]()
    with using(model):
        batcher = Batcher(model, decoding, batch=slots, context=context, trace=trace, ignore_mismatch=ignore_mismatch)
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            batcher.submit(Request(prompt, limit, (seed, index), stops))
        while batcher.active or batcher.waiting:
            for index, tokens, reason in batcher.step():
                outputs[index] += tokens
                steps[index] += 1
                histogram[len(tokens) - 1] += 1
                if reason is not None:
                    reasons[index] = reason
                if on_tokens is not None:
                    on_tokens(index, tokens, reason)
    return GenerationResult(
        outputs,
        reasons,
        batcher.served,
        "closed" if slots == len(prompts) else "continuous",
        steps,
        [histogram[n] for n in range(max(histogram) + 1)],
        batcher.counters,
        batcher.prefill_seconds,
        batcher.decode_seconds,
        batcher.full_tokens,
        batcher.full_seconds,
    )
