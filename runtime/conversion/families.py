"""Losses around the conversion, greedy acceptance lengths and right answers, per task family and for source text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.config import DecodingConfig, require
from runtime.conversion.comparison import SAMPLED
from runtime.conversion.data import evaluation_problems, source_prompts
from runtime.conversion.tasks import FAMILIES, Problem
from runtime.engine import generate
from runtime.model.zaya import Zaya
from runtime.quality import disagreement, exact_match, negative_log_likelihood
from runtime.statistics import Estimate, ratio, wilson
from runtime.tokenizer import BOS, EOS, ByteTokenizer

SOURCE = "source text"
SOURCE_BYTES = 128  # of the prompt, and of what follows it


def _two_forward(draft_tokens: int = 16, **settings: Any) -> DecodingConfig:
    return DecodingConfig("two_forward", draft_tokens=draft_tokens, **settings)


RUNS: dict[str, DecodingConfig] = {
    "autoregressive": DecodingConfig(),
    "K=4": _two_forward(4),
    "K=8": _two_forward(8),
    "K=16": _two_forward(),
    "K=24": _two_forward(24),
    "K=16 anchor": _two_forward(anchor_draft=True),
    "w=0.75": _two_forward(mixing_weight=0.75),
    "w=0.5": _two_forward(mixing_weight=0.5),
    "w=0.25": _two_forward(mixing_weight=0.25),
    f"T={SAMPLED}": _two_forward(temperature=SAMPLED),
}
LOSSLESS = "K=16"


@dataclass(frozen=True)
class Run:
    """One family decoded in one way. `acceptance_length` is tokens per step, with an interval over the problems."""

    decoding: DecodingConfig
    tokens: tuple[int, ...]  # per problem
    steps: tuple[int, ...]  # per problem
    acceptance_length: Estimate
    exact_match: Estimate | None  # None for source text, which has no answer
    disagreement: float  # share of tokens that are not the model's own greedy choice
    equal_to_autoregressive: float  # share of outputs that are the greedy autoregressive one, token for token
    example: str  # the first problem's prompt and output: loops would show here


@dataclass(frozen=True)
class Family:
    """Held-out losses in nats per token (before: None without the earlier checkpoint), and the runs by label."""

    loss_before: float | None
    loss_after: float
    runs: dict[str, Run]


def evaluate_families(
    model: Zaya,
    *,
    before: Zaya | None = None,
    problems: int = 40,
    max_new_tokens: int = 150,
    batch: int = 16,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Family]:
    """Decode `problems` held-out problems of each family, and as many source excerpts, in every way of RUNS.

    before: the checkpoint ahead of the conversion, for its loss. progress: what comes next, and the share done.
    """
    require(problems >= 1, f"problems >= 1 must hold, but got {problems}")
    families: dict[str, Family] = {}
    names = [*FAMILIES, SOURCE]
    texts = ByteTokenizer()
    for place, family in enumerate(names):
        tasks: list[Problem] | None = None
        if family == SOURCE:
            pairs = source_prompts(problems, SOURCE_BYTES, seed, SOURCE_BYTES)
            prompts = [[BOS, *prompt] for prompt, _ in pairs]
            truths = [list(text) for _, text in pairs]
            room = SOURCE_BYTES
        else:
            tasks = evaluation_problems(family, problems, seed)
            prompts = [[BOS, *p.prompt.encode()] for p in tasks]
            truths = [[*p.solution.encode(), EOS] for p in tasks]
            room = max_new_tokens
        runs: dict[str, Run] = {}
        greedy: list[list[int]] = []
        for index, (label, decoding) in enumerate(RUNS.items()):
            if progress:
                progress(f"{family}, {label}", (place + index / len(RUNS)) / len(names))
            result = generate(model, prompts, decoding, max_new_tokens=room, seed=seed, batch=batch)
            outputs = result.tokens
            greedy = greedy or outputs
            tokens = [len(o) for o in outputs]
            written = [texts.decode(o) for o in outputs]
            runs[label] = Run(
                decoding,
                tuple(tokens),
                tuple(result.steps),
                ratio(tokens, result.steps),
                exact_match(tasks, written) if tasks is not None else None,
                disagreement(model, prompts, outputs),
                sum(a == b for a, b in zip(outputs, greedy, strict=True)) / len(outputs),
                texts.decode(prompts[0]) + written[0],
            )
        families[family] = Family(
            negative_log_likelihood(before, prompts, truths) if before is not None else None,
            negative_log_likelihood(model, prompts, truths),
            runs,
        )
    return families


def pooled(families: Mapping[str, Family]) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Acceptance length and exact match over all problems of all families but the source text."""
    lengths, correct = {}, {}
    for label in RUNS:
        runs = [family.runs[label] for name, family in families.items() if name != SOURCE]
        lengths[label] = ratio([n for r in runs for n in r.tokens], [n for r in runs for n in r.steps])
        found = [r.exact_match for r in runs if r.exact_match is not None]
        correct[label] = wilson(sum(round(e.value * e.count) for e in found), sum(e.count for e in found))
    return lengths, correct
