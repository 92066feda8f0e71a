"""The samplers' table: every way to decode on the same held-out problems, its speed beside its quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np

from hardware.files import known
from runtime.bench import interleave, paired_ratio
from runtime.config import DecodingConfig, replace, require
from runtime.conversion.data import evaluation_problems
from runtime.conversion.tasks import FAMILIES, Problem
from runtime.engine import generate
from runtime.levels import optimal
from runtime.logits import collect
from runtime.model.zaya import Zaya
from runtime.quality import Likeness, likeness, right
from runtime.samplers.state import TraceStep
from runtime.statistics import (
    Estimate,
    Paired,
    accuracy_under_parallelism,
    bootstrap,
    mcnemar,
    mean,
    pass_rate,
    ratio,
    repetition,
    wilson,
)
from runtime.tokenizer import BOS, ByteTokenizer

SAMPLED = 0.8  # temperature
BASELINE = "autoregressive"
SPARSE = "single_forward/sparse"  # its levels are chosen from the histogram of two_forward on other problems
SPARSE_LEVELS = 4

SETTINGS: dict[str, DecodingConfig] = {
    label: replace(decoding, temperature=SAMPLED)
    for label, decoding in {
        BASELINE: DecodingConfig(),
        "two_forward": DecodingConfig("two_forward"),
        "two_forward/w=0.75": DecodingConfig("two_forward", mixing_weight=0.75),
        "two_forward/w=0.5": DecodingConfig("two_forward", mixing_weight=0.5),
        "two_forward/w=0.25": DecodingConfig("two_forward", mixing_weight=0.25),
        "single_forward": DecodingConfig("single_forward"),
        SPARSE: DecodingConfig("single_forward"),
        "denoising/S=4": DecodingConfig("denoising", denoising_steps=4),
        "denoising/S=8/t=0.9": DecodingConfig("denoising", denoising_steps=8, confidence_threshold=0.9),
        "denoising/S=1": DecodingConfig("denoising"),
        "denoising/S=4/verify": DecodingConfig("denoising", denoising_steps=4, verify=True),
    }.items()
}
# What one dial turns, from the baseline on: the points of an AUP curve.
CURVES: dict[str, tuple[str, ...]] = {
    "two_forward, lossless": (BASELINE, "two_forward"),
    "two_forward, w down to 0.25": (BASELINE, *(label for label in SETTINGS if label.startswith("two_forward"))),
    "single_forward": (BASELINE, SPARSE, "single_forward"),
    "denoising": (BASELINE, "denoising/S=4", "denoising/S=8/t=0.9", "denoising/S=1"),
}


@dataclass(frozen=True)
class Row:
    """One setting. Speeds are of one sequence at a time; comparisons are with the baseline, None of itself."""

    decoding: DecodingConfig  # of the sampled outputs; the greedy ones differ in the temperature alone
    tokens_per_forward: Estimate  # over the timed prompts
    acceptance_length: Estimate  # tokens per step of the sampled outputs, over problems
    tokens_per_second: Estimate  # the rounds' median
    speedup: Estimate | None  # the median of the rounds' ratios
    right: tuple[int, ...]  # of each problem's samples
    pass_at: dict[int, Estimate]  # by k
    greedy: Estimate  # exact match at temperature 0
    likeness: Likeness  # of the first sample of each problem
    pass_1_difference: Estimate | None  # pass@1 less the baseline's, over problems
    sampled_pairs: Paired | None  # the baseline first; same problem, same seed
    greedy_pairs: Paired | None


@dataclass(frozen=True)
class InsideBaseline:
    """Whether a lossless setting's pass@k lies in the baseline's interval, as it must up to chance."""

    setting: str
    k: int
    inside: bool


@dataclass(frozen=True)
class Curve:
    """AUP of a dial's settings (accuracy: pass@1 in percent), by tokens per forward and by tokens per second.

    The intervals resample problems, so they are of the accuracies; the speeds are held.
    """

    settings: tuple[str, ...]
    by_tokens_per_forward: Estimate
    by_tokens_per_second: Estimate


@dataclass(frozen=True)
class Comparison:
    """The table, and what was asked for it."""

    temperature: float
    problems: int  # of each family
    samples: int  # of each problem
    rounds: int  # of the speeds
    rows: dict[str, Row]
    lossless: tuple[InsideBaseline, ...]
    curves: dict[str, Curve]
    reference_repetition: Estimate | None  # of the worked solutions: what text without loops has


def choose(labels: Sequence[str] | None) -> dict[str, DecodingConfig]:
    """The settings of these labels (None: all), the baseline among them. UserError lists the known ones."""
    for label in labels or ():
        if label not in SETTINGS:
            raise known("setting", label, SETTINGS)
    return {label: d for label, d in SETTINGS.items() if labels is None or label in labels or label == BASELINE}


def compare(
    model: Zaya,
    *,
    settings: Sequence[str] | None = None,
    problems: int = 5,
    samples: int = 16,
    ks: Sequence[int] = (1, 16),
    max_new_tokens: int = 150,
    batch: int = 64,
    rounds: int = 6,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Comparison:
    """Decode `problems` held-out problems of each family, `samples` times each and once greedily, in every setting.

    settings: labels of SETTINGS (None: all). ks: of pass@k. batch: sequences at once for quality. rounds: how often
    the first problem of each family is timed, the settings in turn. Raises UserError for unknown labels, and for more
    ks than samples.
    """
    chosen = choose(settings)
    for name, value in (("problems", problems), ("samples", samples), ("batch", batch), ("rounds", rounds)):
        require(value >= 1, f"{name} >= 1 must hold, but got {value}")
    for k in ks:
        require(1 <= k <= samples, f"pass@k needs 1 <= k <= samples = {samples}, but got k = {k}")
    tasks = [p for family in FAMILIES for p in evaluation_problems(family, problems, seed)]
    if SPARSE in chosen:
        chosen[SPARSE] = replace(chosen[SPARSE], proposal_levels=_levels(model, problems, max_new_tokens, batch, seed))
    total, done = len(chosen) * (samples + rounds + 2), count(1)

    def finished(label: str) -> None:
        if progress:
            progress(label, next(done) / total)

    runs = {
        label: _sample(model, tasks, decoding, samples, max_new_tokens, batch, seed, partial(finished, label))
        for label, decoding in chosen.items()
    }
    timed = interleave(
        {
            label: partial(_timed, model, tasks[::problems], decoding, max_new_tokens, count(seed), label, finished)
            for label, decoding in chosen.items()
        },
        rounds,
    )
    rates = {label: [s.tokens_per_second for s in found] for label, found in timed.items()}
    rows = {}
    for label, run in runs.items():
        base = None if label == BASELINE else runs[BASELINE]
        rows[label] = Row(
            run.decoding,
            ratio(*(np.sum([getattr(s, key) for s in timed[label]], 0).tolist() for key in ("tokens", "forwards"))),
            ratio(run.tokens, run.steps),
            Estimate(*paired_ratio(rates[label], [1.0] * rounds), rounds),
            Estimate(*paired_ratio(rates[label], rates[BASELINE]), rounds) if base else None,
            run.rights,
            {k: pass_rate(run.rights, samples, k) for k in ks},
            wilson(sum(run.greedy), len(tasks)),
            run.likeness,
            mean([(a - b) / samples for a, b in zip(run.rights, base.rights, strict=True)]) if base else None,
            mcnemar(base.right, run.right) if base else None,
            mcnemar(base.greedy, run.greedy) if base else None,
        )
    repeated = [repetition(p.solution.encode()) for p in tasks]
    return Comparison(
        SAMPLED,
        problems,
        samples,
        rounds,
        rows,
        _inside_baseline(rows),
        _curves(rows, samples),
        ratio([r for r, _ in repeated], [n for _, n in repeated]),
    )


@dataclass(frozen=True)
class _Sampled:
    """The outputs of one setting: what was right, the tokens and steps it took, and what the first samples are like."""

    decoding: DecodingConfig
    tokens: list[int]  # of each problem, all samples together
    steps: list[int]
    right: list[bool]  # sample by sample, each over all problems
    greedy: list[bool]
    likeness: Likeness

    @property
    def rights(self) -> tuple[int, ...]:
        """How many samples of each problem were right."""
        problems = len(self.tokens)
        return tuple(sum(self.right[i::problems]) for i in range(problems))


def _sample(
    model: Zaya,
    tasks: Sequence[Problem],
    decoding: DecodingConfig,
    samples: int,
    max_new_tokens: int,
    batch: int,
    seed: int,
    finished: Callable[[], None],
) -> _Sampled:
    """Decode every problem `samples` times and greedily. Sample s of problem i has the stream (seed + s, i)."""
    prompts, texts = [_prompt(p) for p in tasks], ByteTokenizer()
    run = partial(generate, model, prompts, max_new_tokens=max_new_tokens, batch=batch)
    trace: list[TraceStep] = []
    results = []
    for sample in range(samples):
        results.append(run(decoding, seed=seed + sample, trace=None if sample else trace))
        finished()
    greedy = run(replace(decoding, temperature=0.0), seed=seed)
    first = results[0].tokens
    found = likeness(model, prompts, first, collect(trace, decoding, [len(o) for o in first]))
    finished()
    return _Sampled(
        decoding,
        np.sum([[len(o) for o in r.tokens] for r in results], 0).tolist(),
        np.sum([r.steps for r in results], 0).tolist(),
        [mark for r in results for mark in right(tasks, [texts.decode(o) for o in r.tokens])],
        right(tasks, [texts.decode(o) for o in greedy.tokens]),
        found,
    )


@dataclass(frozen=True)
class _Timed:
    """One round: per prompt, decoded alone."""

    tokens: tuple[int, ...]
    forwards: tuple[int, ...]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / self.seconds


def _timed(
    model: Zaya,
    tasks: Sequence[Problem],
    decoding: DecodingConfig,
    max_new_tokens: int,
    seeds: count[int],
    label: str,
    finished: Callable[[str], None],
) -> _Timed:
    """Decode the problems one by one with the next seed."""
    seed = next(seeds)
    found = [generate(model, [_prompt(p)], decoding, max_new_tokens=max_new_tokens, seed=seed) for p in tasks]
    finished(f"{label}, timed")
    return _Timed(
        tuple(len(r.tokens[0]) for r in found),
        tuple(r.forwards for r in found),
        sum(r.decode_seconds for r in found),
    )


def _levels(model: Zaya, problems: int, max_new_tokens: int, batch: int, seed: int) -> tuple[int, ...]:
    """The best levels for what two_forward accepts on as many other problems, which the table does not contain."""
    tasks = [p for family in FAMILIES for p in evaluation_problems(family, 2 * problems, seed)[problems:]]
    decoding = SETTINGS["two_forward"]
    prompts = [_prompt(p) for p in tasks]
    result = generate(model, prompts, decoding, max_new_tokens=max_new_tokens, seed=seed, batch=batch)
    steps = result.acceptance_histogram
    return optimal([*steps, *[0] * (decoding.draft_tokens + 1 - len(steps))], SPARSE_LEVELS)


def _prompt(problem: Problem) -> list[int]:
    return [BOS, *problem.prompt.encode()]


def _inside_baseline(rows: dict[str, Row]) -> tuple[InsideBaseline, ...]:
    return tuple(
        InsideBaseline(label, k, rows[BASELINE].pass_at[k].holds(found.value))
        for label, row in rows.items()
        if row.decoding.lossless and label != BASELINE
        for k, found in row.pass_at.items()
    )


def _curves(rows: dict[str, Row], samples: int) -> dict[str, Curve]:
    """AUP of the curves that have a point besides the baseline."""
    accuracy = {label: 100 * np.asarray(row.right) / samples for label, row in rows.items()}
    problems = len(accuracy[BASELINE])

    def estimate(labels: Sequence[str], speeds: Sequence[float]) -> Estimate:
        def area(index: list[int]) -> float:
            found = {label: float(values[index].mean()) for label, values in accuracy.items()}
            points = [(speed, found[label]) for speed, label in zip(speeds, labels, strict=True)]
            return accuracy_under_parallelism(points, max(found.values()))

        return bootstrap(area, problems)

    curves = {}
    for name, known_labels in CURVES.items():
        labels = tuple(label for label in known_labels if label in rows)
        if len(labels) > 1:
            curves[name] = Curve(
                labels,
                estimate(labels, [rows[label].tokens_per_forward.value for label in labels]),
                estimate(labels, [rows[label].tokens_per_second.value for label in labels]),
            )
    return curves
