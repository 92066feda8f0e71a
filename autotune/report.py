"""What a tuning run tells beside its decision, as plain data: how good the predictions were, stage by stage, what ended
trials, what mattered, how fast the best was found, and what the model's seeds were worth. `autotune.render` prints it.
"""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autotune.objective import DECODING_STAGES
from autotune.results import StudyResult, TrialRecord, spearman
from hardware.files import plain

if TYPE_CHECKING:
    from autotune.tiling_results import TilingResult

LEAST_FOR_IMPORTANCES = 10  # settings
_TOP_SHARE, _TOP_COUNT = 0.1, 5  # PED-ANOVA asks what the top tenth has in common, and wants at least 5 settings there
MODEL_SOURCES = ("seed", "guided")  # of trials that predictions chose, alone or corrected by what was measured


@dataclass(frozen=True)
class Score:
    """Predicted against measured in one stage. error: median of |predicted / measured - 1|; ratio: median of the two's.

    rank_correlation: Spearman's; None for fewer than three settings, or all alike.
    """

    stage: str
    quantity: str
    count: int
    rank_correlation: float | None
    error: float | None
    ratio: float | None


@dataclass(frozen=True)
class StageCount:
    """How many settings entered a stage, and which outcomes ended how many there."""

    stage: str
    entered: int
    ended: dict[str, int]


@dataclass(frozen=True)
class Improvement:
    """A trial that was the best of the allowed settings when it came.

    evaluation: distinct settings tried by then, it included. seconds: what these took, added up; None where unknown.
    """

    evaluation: int
    seconds: float | None
    trial: int
    source: str
    tokens_per_second: float


@dataclass(frozen=True)
class Importance:
    """What a parameter contributes to being among the fastest settings, as a share of all parameters' contributions."""

    parameter: str
    share: float
    settings: int  # measured ones in which it was set


@dataclass(frozen=True)
class SourceBest:
    """Who proposed how many settings, how many of them may be chosen, and the fastest of these (None: none)."""

    source: str
    settings: int
    allowed: int
    tokens_per_second: float | None


@dataclass(frozen=True)
class Seeding:
    """What the model's choices were worth, among the allowed settings (tokens per second; None: there was none).

    count: settings of either kind that are compared, the first ones. seeded: the best of the model's; others: the best
    of as many that the search library proposed, which had seen the results of the model's: this favours it.
    best_source: who proposed the best setting of all. without: the best of everything but
    the model's choices. They are speeds of single trials, and a search without the model would have tried others.
    """

    sources: tuple[SourceBest, ...]
    count: int
    seeded: float | None
    others: float | None
    best_trial: int | None
    best_source: str | None
    best: float | None
    without: float | None


@dataclass(frozen=True)
class StudyReport:
    """A study's report. `curve` holds improvements only; `evaluations` is how many settings were tried in all."""

    name: str
    simulated: str | None
    evaluations: int
    seconds: float | None
    max_divergence: float
    scores: tuple[Score, ...]
    stages: tuple[StageCount, ...]
    front: tuple[TrialRecord, ...]
    importances: tuple[Importance, ...]
    importances_missing: str  # why there are none
    top_share: float | None  # of the settings that importances tell from the rest
    curve: tuple[Improvement, ...]
    seeding: Seeding
    decision: str
    kept_default: bool | None


@dataclass(frozen=True)
class TilingReport:
    """A kernel's tilings in one bucket of tokens: the one to run beside the default, and how well the model ranked.

    routing: where the experts' routes came from; "" for a kernel without. simulated: what of them was not real.
    """

    name: str
    routing: str
    simulated: str | None
    outcomes: dict[str, int]
    rank_correlation: float | None
    tiling: dict[str, int] | None
    default: dict[str, int] | None
    ratio: float | None
    low: float | None
    high: float | None
    rounds: int
    reason: str


def study_report(result: StudyResult) -> StudyReport:
    """Everything but the tilings, of one bucket."""
    decision = result.decision
    most = decision.max_divergence if decision else 0.0
    importances, missing, top = _importances(result)
    curve, seconds = _curve(result, most)
    return StudyReport(
        name=result.name,
        simulated=result.subject.simulated,
        evaluations=len(result.measured),
        seconds=seconds,
        max_divergence=most,
        scores=_scores(result),
        stages=_stages(result.measured),
        front=tuple(result.front()),
        importances=importances,
        importances_missing=missing,
        top_share=top,
        curve=curve,
        seeding=_seeding(result, most),
        decision=decision.reason if decision else "not decided yet",
        kept_default=decision.kept_default if decision else None,
    )


def tiling_report(result: TilingResult) -> TilingReport:
    """The tilings of one kernel and bucket."""
    decision = result.decision
    return TilingReport(
        name=result.name,
        routing=result.subject.routing,
        simulated=result.subject.simulated,
        outcomes=dict(Counter(str(t.outcome) for t in result.trials if t.outcome)),
        rank_correlation=result.rank_correlation(),
        tiling=decision.tiling if decision else None,
        default=decision.default if decision else None,
        ratio=decision.ratio if decision else None,
        low=decision.low if decision else None,
        high=decision.high if decision else None,
        rounds=decision.rounds if decision else 0,
        reason=decision.reason if decision else "not decided yet",
    )


def info(results: Sequence[StudyResult], tilings: Sequence[TilingResult] = ()) -> dict[str, Any]:
    """The whole report as plain data for JSON."""
    return {
        "studies": [plain(study_report(r)) for r in results],
        "tilings": [plain(tiling_report(t)) for t in tilings],
    }


def _scores(result: StudyResult) -> tuple[Score, ...]:
    tried, correct = result.measured, result.correct
    return (
        _score("micro_benchmark", "seconds of a step", [(t.predicted_step_seconds, t.step_seconds) for t in tried]),
        _score(
            "decode",
            "tokens of a step",
            [(t.predicted_tokens_per_step, t.acceptance_length) for t in correct if t.acceptance_length],
        ),
        _score("decode", "tokens per second", [(t.predicted_tokens_per_second, t.tokens_per_second) for t in correct]),
    )


def _score(stage: str, quantity: str, pairs: Sequence[tuple[float | None, float | None]]) -> Score:
    both = [(p, m) for p, m in pairs if p is not None and m is not None and m > 0]
    ratios = [p / m for p, m in both]
    return Score(
        stage,
        quantity,
        len(both),
        spearman(both),
        statistics.median(abs(r - 1) for r in ratios) if ratios else None,
        statistics.median(ratios) if ratios else None,
    )


def _stages(measured: Sequence[TrialRecord]) -> tuple[StageCount, ...]:
    found, left = [], len(measured)
    for stage in DECODING_STAGES:
        ended = Counter(str(t.outcome) for t in measured if t.stage == stage)
        found.append(StageCount(stage, left, dict(sorted(ended.items()))))
        left -= sum(ended.values())
    return tuple(found)


def _curve(result: StudyResult, max_divergence: float) -> tuple[tuple[Improvement, ...], float | None]:
    """The best so far, and what all trials took; seconds are unknown from the first trial on that does not say."""
    allowed = {t.number for t in result.allowed(max_divergence)}
    found: list[Improvement] = []
    seconds: float | None = 0.0
    for evaluation, trial in enumerate(result.measured, 1):
        spent = trial.spent_seconds
        seconds = None if seconds is None or spent is None else seconds + spent
        speed = trial.tokens_per_second or 0.0
        if trial.number in allowed and (not found or speed > found[-1].tokens_per_second):
            found.append(Improvement(evaluation, seconds, trial.number, trial.source, speed))
    return tuple(found), seconds


def _seeding(result: StudyResult, max_divergence: float) -> Seeding:
    allowed = {t.number: t for t in result.allowed(max_divergence)}

    def best(trials: Sequence[TrialRecord]) -> TrialRecord | None:
        return max((t for t in trials if t.number in allowed), key=lambda t: t.tokens_per_second or 0.0, default=None)

    def speed(trial: TrialRecord | None) -> float | None:
        return trial.tokens_per_second if trial else None

    seeds = [t for t in result.measured if t.source in MODEL_SOURCES]
    others = [t for t in result.measured if t.source == "search"]
    count = min(len(seeds), len(others))
    fastest = best(result.measured)
    by_source: dict[str, list[TrialRecord]] = {}
    for trial in result.measured:
        by_source.setdefault(trial.source, []).append(trial)
    return Seeding(
        sources=tuple(
            SourceBest(source, len(trials), sum(t.number in allowed for t in trials), speed(best(trials)))
            for source, trials in by_source.items()
        ),
        count=count,
        seeded=speed(best(seeds[:count])),
        others=speed(best(others[:count])),
        best_trial=fastest.number if fastest else None,
        best_source=fastest.source if fastest else None,
        best=speed(fastest),
        without=speed(best([t for t in result.measured if t.source not in MODEL_SOURCES])),
    )


def _importances(result: StudyResult) -> tuple[tuple[Importance, ...], str, float | None]:
    """PED-ANOVA of tokens per second over the settings that ran right, or why there is none.

    Optuna's evaluator compares the settings in the top share with all of them, parameter by parameter; one that is set
    under a condition counts among the settings in which it was (conditional PED-ANOVA, arXiv 2601.20800). The settings
    were proposed by a search, not drawn evenly: this tells what made some of *these* faster than others.
    """
    correct = result.correct
    if len(correct) < LEAST_FOR_IMPORTANCES:
        return (), f"{len(correct)} settings ran, at least {LEAST_FOR_IMPORTANCES} are needed", None
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    kinds: dict[str, BaseDistribution] = {}
    for parameter in result.subject.space.parameters:
        if parameter.kind == "choice":
            kinds[parameter.name] = CategoricalDistribution(parameter.choices)
        elif parameter.kind == "integer":
            kinds[parameter.name] = IntDistribution(int(parameter.low), int(parameter.high))
        else:
            kinds[parameter.name] = FloatDistribution(parameter.low, parameter.high, step=parameter.step)
    top = min(0.5, max(_TOP_SHARE, _TOP_COUNT / len(correct)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # conditions that few settings met; the minimised target: it is negated
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would announce the study
        study = optuna.create_study(direction="maximize")
        for trial in correct:
            study.add_trial(
                optuna.create_trial(
                    params=trial.params,
                    distributions={name: kinds[name] for name in trial.params},
                    value=trial.tokens_per_second,
                )
            )
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=top)
        )
    if len({round(share, 9) for share in found.values()}) == 1 and len(found) > 1:
        return (), "the fastest settings are spread like all settings", None
    counts = Counter(name for t in correct for name in t.params)
    return tuple(Importance(name, float(share), counts[name]) for name, share in found.items()), "", top
