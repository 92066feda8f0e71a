"""The whole evaluation of a checkpoint: task families, samplers, and where the figures came from."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hardware.files import plain, write_atomic
from runtime.bench import identify
from runtime.config import Engine, require
from runtime.conversion.comparison import Comparison, choose, compare
from runtime.conversion.families import Family, evaluate_families, pooled
from runtime.model.zaya import Zaya
from runtime.statistics import Estimate
from runtime.tokenizer import VOCABULARY


@dataclass(frozen=True)
class Evaluation:
    """Everything the card's tables say, and where it came from."""

    model: str
    model_hash: str
    command: str
    commit: str
    date: str
    device: dict[str, Any]  # that the speeds are of
    engine: Engine  # that decoded
    python: str  # whose standard library is the source text
    seed: int
    families: dict[str, Family]
    verifiable: dict[str, Estimate]  # acceptance length over all task families together, by run
    correct: dict[str, Estimate]  # exact match over all task families together, by run
    samplers: Comparison


def evaluate(
    model: Zaya,
    *,
    name: str,
    command: str,
    before: Zaya | None = None,
    problems: int = 40,
    sampled_problems: int = 5,
    samples: int = 16,
    ks: Sequence[int] = (1, 16),
    settings: Sequence[str] | None = None,
    max_new_tokens: int = 150,
    batch: int = 64,
    rounds: int = 6,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Evaluation:
    """Decode `problems` held-out problems of each family greedily, then `sampled_problems` in every setting.

    before: the checkpoint ahead of the conversion, for its losses. The other arguments are those of
    `evaluate_families` and `compare`. progress: what is done, and the share done, of the samplers' table first.
    Raises UserError for a model without masks or without the byte vocabulary.
    """
    require(model.config.mask_token_id is not None, "this model's config has no mask_token_id: it cannot draft")
    require(model.config.vocab_size == VOCABULARY, "the tasks are bytes: the model must have zaya-nano's vocabulary")
    require(problems >= 1, f"problems >= 1 must hold, but got {problems}")
    choose(settings)

    def part(begin: float, end: float) -> Callable[[str, float], None]:
        return lambda label, done: progress(label, begin + (end - begin) * done) if progress else None

    samplers = compare(
        model,
        settings=settings,
        problems=sampled_problems,
        samples=samples,
        ks=ks,
        max_new_tokens=max_new_tokens,
        batch=batch,
        rounds=rounds,
        seed=seed,
        progress=part(0.0, 0.75),
    )
    families = evaluate_families(
        model,
        before=before,
        problems=problems,
        max_new_tokens=max_new_tokens,
        batch=batch,
        seed=seed,
        progress=part(0.75, 1.0),
    )
    origin = identify(model, name, command)
    return Evaluation(
        name,
        origin.model_hash,
        command,
        origin.commit,
        f"{datetime.now(UTC):%Y-%m-%d}",
        origin.device,
        model.kernels.engine,
        platform.python_version(),
        seed,
        families,
        *pooled(families),
        samplers,
    )


def write_evaluation(evaluation: Evaluation, path: Path) -> Path:
    """The evaluation as JSON."""
    return write_atomic(path, json.dumps(plain(evaluation), indent=1) + "\n")
