"""The data of a study's figures and tables, by column: what a page shows and gives to download. Streamlit-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autotune.objective import DECODING_STAGES
from autotune.report import StudyReport
from autotune.results import StudyResult
from dashboards.evidence import FrontInfo
from dashboards.studies import HistoryInfo, ParallelInfo, RankInfo, StagesInfo, word
from dashboards.trials import setting_text

if TYPE_CHECKING:
    from autotune.tiling_results import TilingResult

Columns = dict[str, list[Any]]


def front_columns(info: FrontInfo) -> Columns:
    """The front, then what it dominates."""
    points = [*info.front, *info.dominated]
    return {
        "place": ["front"] * len(info.front) + ["dominated"] * len(info.dominated),
        "setting": [p.label for p in points],
        "tokens/s": [p.tokens_per_second for p in points],
        "share that differs": [p.divergence for p in points],
        "default": [p.default for p in points],
        "chosen": [p.chosen for p in points],
    }


def history_columns(info: HistoryInfo) -> Columns:
    """Every setting in the order in which it was tried."""
    return {
        "settings tried": [p.evaluation for p in info.points],
        "time measuring (s)": [p.seconds for p in info.points],
        "trial": [p.trial for p in info.points],
        "outcome": [p.outcome for p in info.points],
        "tokens/s": [p.tokens_per_second for p in info.points],
        "setting": [p.label for p in info.points],
    }


def parallel_columns(info: ParallelInfo) -> Columns:
    """The values on every axis."""
    return {"trial": list(info.trials), **{axis.name: list(axis.values) for axis in info.axes}}


def importance_columns(report: StudyReport) -> Columns:
    """Shares by which parameters tell the fastest settings from the others."""
    return {
        "parameter": [i.parameter for i in report.importances],
        "share": [i.share for i in report.importances],
        "settings with it": [i.settings for i in report.importances],
    }


def rank_columns(info: RankInfo) -> Columns:
    """Both speeds of every setting that has them."""
    return {
        "trial": [p.trial for p in info.points],
        "source": [p.source for p in info.points],
        "predicted tokens/s": [p.predicted for p in info.points],
        "measured tokens/s": [p.measured for p in info.points],
        "acceptance counted on it": [p.counted_on for p in info.points],
        "setting": [p.label for p in info.points],
    }


def score_columns(report: StudyReport) -> Columns:
    """Predicted against measured, stage by stage, of all settings."""
    return {
        "stage": [s.stage for s in report.scores],
        "predicted and measured": [s.quantity for s in report.scores],
        "settings": [s.count for s in report.scores],
        "rank correlation": [s.rank_correlation for s in report.scores],
        "median error (share)": [s.error for s in report.scores],
        "predicted / measured": [s.ratio for s in report.scores],
    }


def source_columns(report: StudyReport) -> Columns:
    """Who proposed how many settings, and the fastest of these."""
    found = report.seeding.sources
    return {
        "proposed by": [s.source for s in found],
        "settings": [s.settings for s in found],
        "may be chosen": [s.allowed for s in found],
        "fastest of these, tokens/s": [s.tokens_per_second for s in found],
    }


def stage_columns(info: StagesInfo) -> Columns:
    """A row for each stage and outcome that ended settings there; one for a stage that ended none."""
    rows = [(s, outcome, count) for s in info.stages for outcome, count in (s.ended or {"": 0}).items()]
    return {
        "stage": [s.stage for s, _, _ in rows],
        "entered": [s.entered for s, _, _ in rows],
        "outcome": [outcome for _, outcome, _ in rows],
        "ended": [count for _, _, count in rows],
    }


TRIAL_COLUMNS = (
    "trial", "source", "outcome", "stage", "tokens/s", "predicted tokens/s", "differs (%)", "tokens a step",
    "step (ms)", "spent (s)",
)  # fmt: skip


def trial_columns(result: StudyResult) -> Columns:
    """Every setting that was tried, the fastest first, with a column for each parameter."""
    trials = sorted(result.measured, key=lambda t: -(t.tokens_per_second or 0.0))
    rows = [
        (
            t.number,
            t.source,
            t.outcome,
            t.stage,
            t.tokens_per_second,
            t.predicted_tokens_per_second,
            None if t.divergence is None else 100 * t.divergence,
            t.acceptance_length,
            None if t.step_seconds is None else 1e3 * t.step_seconds,
            t.spent_seconds,
        )
        for t in trials
    ]
    found: Columns = {name: [row[i] for row in rows] for i, name in enumerate(TRIAL_COLUMNS)}
    for parameter in result.subject.space.parameters:
        values = [t.params.get(parameter.name) for t in trials]
        mixed = parameter.kind == "choice" and len({type(v) for v in parameter.choices}) > 1
        found[parameter.name] = [None if v is None else word(v) if mixed else v for v in values]
    return found


def failed_columns(result: StudyResult) -> Columns:
    """The settings that did not run through all stages, by stage and outcome, and why."""
    order = {stage: i for i, stage in enumerate(DECODING_STAGES)}
    failed = [t for t in result.measured if t.outcome != "correct"]
    failed.sort(key=lambda t: (order.get(t.stage, -1), str(t.outcome), t.number))
    return {
        "trial": [t.number for t in failed],
        "outcome": [t.outcome for t in failed],
        "ended in": [t.stage for t in failed],
        "reason": [t.reason for t in failed],
        "setting": [setting_text(t) for t in failed],
    }


def tiling_columns(results: Sequence[TilingResult]) -> Columns:
    """A row for each kernel and bucket: the tiling to run, and what it gains over the default."""
    from autotune.report import tiling_report

    reports = [tiling_report(result) for result in results]
    return {
        "kernel and bucket": [r.name for r in reports],
        "routes": [r.routing for r in reports],
        "against the default (x)": [r.ratio for r in reports],
        "95% from": [r.low for r in reports],
        "to": [r.high for r in reports],
        "rounds": [r.rounds for r in reports],
        "rank correlation": [r.rank_correlation for r in reports],
        "tilings": [", ".join(f"{n} {outcome}" for outcome, n in sorted(r.outcomes.items())) for r in reports],
        "to run": [", ".join(f"{k} {v}" for k, v in (r.tiling or {}).items()) for r in reports],
        "decision": [r.reason for r in reports],
        "simulated": [r.simulated for r in reports],
    }
