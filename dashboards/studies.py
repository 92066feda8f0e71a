"""What the page about tuning shows of a study, as plain data: `study_figures` draws it. Streamlit-free."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autotune.objective import Outcome
from autotune.report import Improvement, Score, StageCount, StudyReport
from autotune.results import StudyResult, TrialRecord, spearman
from autotune.space import Parameter, Value
from dashboards.evidence import FrontInfo, front_info
from dashboards.trials import front_points, setting_text

NOT_SET = "not set"
COUNTED_ON = ("default", "pilot")  # the trials that acceptance was counted on for the model's predictions of all others
_MOST_TICKS = 9
_SPREAD = 0.3  # of the distance between two values of a parameter


@dataclass(frozen=True)
class HistoryPoint:
    """A setting that was tried, in the order in which settings were. seconds: measured by then; None where unknown."""

    evaluation: int
    seconds: float | None
    trial: int
    outcome: Outcome
    tokens_per_second: float | None  # None: it ended before it was measured
    label: str


@dataclass(frozen=True)
class HistoryInfo:
    """Every setting that was tried, and those that were the best of what may be chosen when they came."""

    points: tuple[HistoryPoint, ...]
    best: tuple[Improvement, ...]
    max_divergence: float


def history_info(result: StudyResult, report: StudyReport) -> HistoryInfo:
    """The search as it went."""
    points = []
    seconds: float | None = 0.0
    for evaluation, trial in enumerate(result.measured, 1):
        assert trial.outcome is not None
        seconds = None if seconds is None or trial.spent_seconds is None else seconds + trial.spent_seconds
        label = f"trial {trial.number} ({trial.source}): {setting_text(trial)}"
        points.append(
            HistoryPoint(
                evaluation, seconds, trial.number, trial.outcome, trial.tokens_per_second, _with_reason(label, trial)
            )
        )
    return HistoryInfo(tuple(points), report.curve, report.max_divergence)


def pareto_info(result: StudyResult) -> FrontInfo:
    """The front of the settings that ran and were right: the others have no speed and divergence to be drawn at."""
    return front_info([point for point in front_points(result) if point.feasible])


@dataclass(frozen=True)
class StagesInfo:
    """By stage, how many settings ended there with which outcome, and how many went on."""

    stages: tuple[StageCount, ...]

    @property
    def outcomes(self) -> dict[str, int]:
        """How many settings ended with each outcome, in any stage."""
        found: dict[str, int] = {}
        for stage in self.stages:
            for outcome, count in stage.ended.items():
                found[outcome] = found.get(outcome, 0) + count
        return found


@dataclass(frozen=True)
class RankPoint:
    """A setting with both speeds, in tokens per second. counted_on: the predictions of others use its acceptance."""

    trial: int
    source: str
    predicted: float
    measured: float
    counted_on: bool
    label: str


@dataclass(frozen=True)
class RankInfo:
    """Predicted beside measured speeds. correlation: Spearman's of the settings that no acceptance was counted on.

    error: their median of |predicted / measured - 1|. Both None where there are too few.
    """

    points: tuple[RankPoint, ...]
    count: int
    correlation: float | None
    error: float | None
    scores: tuple[Score, ...]


def rank_info(result: StudyResult, report: StudyReport) -> RankInfo:
    """How well the performance model ordered what was then measured."""
    points = tuple(
        RankPoint(
            t.number,
            t.source,
            t.predicted_tokens_per_second,
            t.tokens_per_second,
            t.source in COUNTED_ON,
            f"trial {t.number} ({t.source}): {setting_text(t)}",
        )
        for t in result.correct
        if t.predicted_tokens_per_second and t.tokens_per_second
    )
    others = [(p.predicted, p.measured) for p in points if not p.counted_on]
    error = statistics.median(abs(p / m - 1) for p, m in others) if others else None
    return RankInfo(points, len(others), spearman(others), error, report.scores)


@dataclass(frozen=True)
class Axis:
    """One axis of parallel coordinates: a value and a position per setting, and the words at some positions."""

    name: str
    values: tuple[Value | None, ...]  # None: the parameter does not apply
    positions: tuple[float, ...]
    ticks: tuple[float, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class ParallelInfo:
    """The settings that ran right, an axis for each parameter with several values among them, then what was found."""

    trials: tuple[int, ...]
    axes: tuple[Axis, ...]
    tokens_per_second: tuple[float, ...]


def parallel_info(result: StudyResult) -> ParallelInfo:
    """Parameters, divergence and speed side by side, the fastest setting last: it is drawn above the others."""
    trials = sorted(result.correct, key=lambda t: t.tokens_per_second or 0.0)
    axes = [_axis(p, [t.params.get(p.name) for t in trials]) for p in result.subject.space.parameters]
    speeds = tuple(t.tokens_per_second or 0.0 for t in trials)
    found = [axis for axis in axes if len({*axis.values} - {None}) > 1]
    divergences = tuple(100 * (t.divergence or 0.0) for t in trials)
    if len(set(divergences)) > 1:
        found.append(Axis("differs (%)", divergences, divergences, *_even(divergences)))
    found.append(Axis("tokens/s", speeds, speeds, *_even(speeds)))
    return ParallelInfo(tuple(t.number for t in trials), tuple(found), speeds)


def _axis(parameter: Parameter, values: Sequence[Value | None]) -> Axis:
    """Choices at whole numbers, numbers at themselves; below both, where a parameter does not apply.

    Settings with the same value lie beside each other, in their order: the lines of all of them are seen.
    """
    numeric = parameter.kind != "choice"
    if numeric:  # free of the rounding that a search adds to steps
        rounded = [None if v is None else round(float(v), 6) for v in values]
        places: dict[Value, float] = {v: v for v in rounded if v is not None}
        values = rounded
    else:
        places = {v: float(i) for i, v in enumerate(v for v in parameter.choices if v in values)}
    words = {place: word(v) for v, place in places.items()}
    shown = sorted(words)
    every = -(-len(shown) // _MOST_TICKS) or 1
    shown = shown[::-1][::every][::-1]  # the largest in any case
    low, high = min(words, default=0.0), max(words, default=0.0)
    below = low - (max(parameter.step, 0.12 * (high - low)) if numeric else 1.0)
    if None in values:
        words[below] = NOT_SET
        shown.insert(0, below)
    positions = [below if v is None else places[v] for v in values]
    width = _SPREAD * (parameter.step if numeric else 1.0)
    for place in set(positions):
        same = [i for i, position in enumerate(positions) if position == place]
        for order, i in enumerate(same):
            positions[i] += width * (2 * order / max(1, len(same) - 1) - 1 if len(same) > 1 else 0)
    return Axis(parameter.name, tuple(values), tuple(positions), tuple(shown), tuple(words[p] for p in shown))


def _even(values: Sequence[float]) -> tuple[tuple[float, ...], tuple[str, ...]]:
    low, high = min(values, default=0.0), max(values, default=0.0)
    ticks = tuple(low + (high - low) * i / 5 for i in range(6))
    return ticks, tuple(f"{tick:,.0f}" if high >= 100 else f"{tick:.1f}" for tick in ticks)


def word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _with_reason(label: str, trial: TrialRecord) -> str:
    return label if trial.outcome == "correct" else f"{label} | {trial.outcome} in {trial.stage}: {trial.reason}"
