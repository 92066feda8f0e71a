"""A study's settings in words and as points of its front, and what was decided. Streamlit-free."""

from __future__ import annotations

from autotune.results import StudyResult, TrialRecord
from dashboards.evidence import FrontPoint
from dashboards.words import percent, rate


def front_points(study: StudyResult) -> list[FrontPoint]:
    """The measured settings of a study as points of its front."""
    decision = study.decision
    return [
        FrontPoint(
            setting_text(trial) + (f" ({trial.outcome})" if trial.outcome != "correct" else ""),
            trial.tokens_per_second,
            trial.divergence,
            feasible=trial.outcome == "correct",
            default=decision is not None and trial.number == decision.default_trial,
            chosen=decision is not None and trial.number == decision.trial,
        )
        for trial in study.measured
    ]


def setting_text(trial: TrialRecord) -> str:
    """A trial's parameters in one line."""
    shown = {k: f"{v:g}" if isinstance(v, float) else v for k, v in trial.params.items()}  # no rounding of steps
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def decision_sentence(study: StudyResult) -> str:
    """What tuning chose and the evidence, or why the default stays."""
    decision = study.decision
    if decision is None:
        return "Tuning was stopped before it could decide."
    evidence = ""
    if decision.comparison is not None:
        found = decision.comparison
        evidence = (
            f" In {found.rounds} alternating rounds the fastest allowed setting ran at {found.ratio:.2f}x the default "
            f"[{found.low:.2f}, {found.high:.2f}]: {rate(found.tokens_per_second)} against "
            f"{rate(found.default_tokens_per_second)}."
        )
    single = study.best_autoregressive()
    if single is not None and single.number != decision.default_trial and single.tokens_per_second is not None:
        evidence += f" The fastest autoregressive setting gave {rate(single.tokens_per_second)}."
    if decision.kept_default:
        return f"The default stays: {decision.reason}.{evidence}"
    chosen = study.trial(decision.trial)
    why = "It mixes the draft's logits into the target" if chosen.params.get("verify", True) else "It verifies nothing"
    lossless = "It is lossless." if chosen.lossless else (
        f"{why}, so it is not lossless by construction: in these prompts "
        f"{percent(chosen.divergence or 0.0)} of the tokens are not the model's own greedy choice after the same text."
    )  # fmt: skip
    return f"Chosen: {setting_text(chosen)}; {decision.reason}.{evidence} {lossless}"
