"""Generation: prefill, then steps of a sampler until every sequence has stopped."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from hardware.files import UserError
from runtime.cache import Cache
from runtime.checkpoint import model_hash
from runtime.config import DecodingConfig, KernelConfig, ModelConfig, require
from runtime.deployment import Deployment, load_deployment
from runtime.layout import causal
from runtime.model.zaya import Zaya
from runtime.samplers import SAMPLERS
from runtime.samplers.acceptance import Randomness
from runtime.samplers.state import Decode, ForwardCounter

PREFILL_TOKENS = 512  # prompt tokens per forward: bounds the memory of the attention mask


@dataclass(frozen=True)
class GenerationResult:
    """New tokens per prompt (a stop token is the last one), and what producing them took."""

    tokens: list[list[int]]
    finish_reasons: list[Literal["stop", "length"]]
    decoding: DecodingConfig
    kernels: KernelConfig  # what was in use
    steps: list[int]  # decoding steps each sequence took part in
    acceptance_histogram: list[int]  # entry n: steps of a sequence that committed n drafts and one token more
    counters: dict[str, ForwardCounter]  # by kind of forward: "decode", "draft", "verify"
    prefill_seconds: float
    decode_seconds: float

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


@torch.inference_mode()
def generate(
    model: Zaya,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig | Deployment | str | os.PathLike[str],
    *,
    max_new_tokens: int,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
) -> GenerationResult:
    """Continue each prompt by up to `max_new_tokens` tokens; all prompts are decoded together (a closed batch).

    decoding: the settings, or a tuned deployment (or its path), whose rule for this batch and context is followed.
    stop_tokens: end a sequence; by default the model's end-of-sequence tokens. A sequence's output depends on the
    seed and its index, not on its neighbours. Raises UserError for empty prompts, unknown tokens, and lengths beyond
    the context. The kernel settings of a deployment hold for this call only.
    """
    _check(model.config, prompts, max_new_tokens, seed)
    longest = max(map(len, prompts)) + max_new_tokens
    settings, kernels = resolve(model, decoding, batch=len(prompts), context=longest)
    stops = frozenset(model.config.stop_token_ids if stop_tokens is None else stop_tokens)
    with using(model, kernels) as used:
        return _decode(model, prompts, settings, used, max_new_tokens, seed, stops)


def _decode(
    model: Zaya,
    prompts: Sequence[Sequence[int]],
    settings: DecodingConfig,
    kernels: KernelConfig,
    max_new_tokens: int,
    seed: int,
    stops: frozenset[int],
) -> GenerationResult:
    """Prefill, then step until every sequence has stopped; finished sequences leave the batch."""
    longest = max(map(len, prompts)) + max_new_tokens
    began = time.perf_counter()
    device = model.model.embed_tokens.weight.device
    cache = model.new_cache(len(prompts), longest + settings.slots, settings.slots)
    _prefill(model, cache, [list(p[:-1]) for p in prompts])
    anchors = torch.tensor([[p[-1]] for p in prompts], device=device)
    decode = Decode(model, cache, settings, anchors, Randomness(seed, len(prompts)), list(range(len(prompts))))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # or what is left of the prefill would count as decoding
    prefilled = time.perf_counter()

    outputs: list[list[int]] = [[] for _ in prompts]
    reasons: list[Literal["stop", "length"]] = ["length"] * len(prompts)
    steps, histogram = [0] * len(prompts), Counter[int]()
    sampler = SAMPLERS[settings.sampler]
    while decode.sequences:
        running = []
        for row, (index, committed) in enumerate(zip(decode.sequences, sampler(decode), strict=True)):
            kept, reason = _truncate(committed, max_new_tokens - len(outputs[index]), stops)
            outputs[index] += kept
            steps[index] += 1
            histogram[len(kept) - 1] += 1
            if reason is None:
                running.append(row)
            else:
                reasons[index] = reason
        if len(running) < len(decode.sequences):
            decode.select(running)
    return GenerationResult(
        outputs,
        reasons,
        settings,
        kernels,
        steps,
        [histogram[n] for n in range(max(histogram) + 1)],
        decode.counters,
        prefilled - began,
        time.perf_counter() - prefilled,
    )


def resolve(
    model: Zaya, decoding: DecodingConfig | Deployment | str | os.PathLike[str], *, batch: int, context: int
) -> tuple[DecodingConfig, KernelConfig | None]:
    """The settings to use, and the kernel settings of a deployment's rule. UserError when it is another model's."""
    if isinstance(decoding, DecodingConfig):
        return decoding, None
    deployment = decoding if isinstance(decoding, Deployment) else load_deployment(decoding)
    found = model_hash(model)
    if deployment.model_hash != found:
        raise UserError(
            f"this deployment was tuned for {deployment.model} ({deployment.model_hash}), but the model is {found}"
        )
    rule = deployment.rule_for(batch, context)
    return rule.decoding, rule.kernels


@contextmanager
def using(model: Zaya, kernels: KernelConfig | None) -> Iterator[KernelConfig]:
    """Run with these kernel settings (None: the present ones), then put the old ones back. Yields what is in use."""
    before = KernelConfig(model.kernels.experts, torch.get_num_threads())
    if kernels is None:
        yield before
        return
    try:
        apply_kernels(model, kernels)
        yield KernelConfig(model.kernels.experts, torch.get_num_threads())
    finally:
        apply_kernels(model, before)


def apply_kernels(model: Zaya, kernels: KernelConfig) -> None:
    """Run the experts and use the threads that a kernel configuration says."""
    model.kernels = kernels
    if kernels.threads is not None:
        torch.set_num_threads(kernels.threads)


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> None:
    """Refuse what cannot be decoded."""
    require(len(prompts) >= 1, "at least one prompt must be given")
    require(max_new_tokens >= 1, f"max_new_tokens >= 1 must hold, but got {max_new_tokens}")
    require(seed >= 0, f"seed >= 0 must hold, but got {seed}")
    for i, prompt in enumerate(prompts):
        require(len(prompt) >= 1, f"a prompt must have at least one token, but prompt {i} is empty")
        require(
            all(0 <= t < config.vocab_size for t in prompt),
            f"0 <= token < vocab_size = {config.vocab_size} must hold, but prompt {i} breaks it",
        )
        needed = len(prompt) + max_new_tokens
        require(
            needed <= config.max_position_embeddings,
            f"prompt and new tokens must fit the context of {config.max_position_embeddings}, but prompt {i} needs "
            f"{len(prompt)} + {max_new_tokens} = {needed}",
        )


def _prefill(model: Zaya, cache: Cache, prompts: list[list[int]]) -> None:
    """Fill the cache with prompts of different lengths, PREFILL_TOKENS positions at a time."""
    device = model.model.embed_tokens.weight.device
    for begin in range(0, max(map(len, prompts)), PREFILL_TOKENS):
        parts = [p[begin : begin + PREFILL_TOKENS] for p in prompts]
        width = max(map(len, parts))
        tokens = torch.tensor([p + [0] * (width - len(p)) for p in parts], dtype=torch.int64, device=device)
        counts = [len(p) for p in parts]
        model.forward(tokens, causal(width, str(device)), cache, counts=counts)
        cache.advance(counts)


def _truncate(
    committed: list[int], room: int, stops: frozenset[int]
) -> tuple[list[int], Literal["stop", "length"] | None]:
    """Cut what a step committed at a stop token or at the length limit."""
    for i, token in enumerate(committed[:room]):
        if token in stops:
            return committed[: i + 1], "stop"
    return committed[:room], "length" if len(committed) >= room else None
