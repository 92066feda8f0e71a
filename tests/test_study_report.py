"""What a study's report says, from made-up trials whose right answers are known; and how much effort is spent."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from autotune.effort import EFFORTS, Budget, duration_seconds, earlier, effort
from autotune.objective import DECODING_STAGES, Comparison, Outcome, Outputs
from autotune.render import FORMATS, Section, as_html, as_markdown, as_text, sections, sparkline, write
from autotune.report import info, study_report
from autotune.results import Decision, StudyResult, Subject, TrialRecord
from autotune.space import Candidate, Value, decoding_space
from hardware.files import UserError
from runtime.config import Workload
from runtime.measurement import Measurement
from tests.made_up import MadeUp, run, small_space, subject, unsynced

SUBJECT = Subject("made-up", "0", {"device": "abacus"}, Workload(1), "prompts", decoding_space(batch=1, cores=2))


def trial(number: int, k: int = 4, speed: float | None = None, source: str = "search", **changes: Any) -> TrialRecord:
    """A lossless setting that ran, unless changed."""
    params: dict[str, Value] = {
        "sampler": "two_forward",
        "threads": 1 + number % 2,
        "draft_tokens": k,
        "anchor_draft": False,
        "experts_block": "loop",
        "mixing_weight": 1.0,
    }
    ran = TrialRecord(
        number,
        params,
        outcome="correct",
        stage="quality",
        source=source,
        tokens_per_second=100.0 + k if speed is None else speed,
        divergence=0.0,
        spent_seconds=2.0,
    )
    return replace(ran, **changes)


def failed(number: int, stage: str, outcome: Outcome) -> TrialRecord:
    return trial(number, outcome=outcome, stage=stage, tokens_per_second=None, divergence=None)


def study(*trials: TrialRecord, decision: Decision | None = None) -> StudyResult:
    return StudyResult("made-up batch=1", SUBJECT, trials, decision)


def test_predictions_are_scored_by_stage() -> None:
    """Each quantity beside its own prediction; a bias shows in the ratio, a wrong order in the correlation."""
    found = study_report(
        study(
            *(
                trial(
                    n,
                    predicted_step_seconds=2.0 * (n + 1),  # twice what is measured
                    step_seconds=1.0 * (n + 1),
                    predicted_tokens_per_step=4.0 - n,  # the wrong way round
                    acceptance_histogram=(10, 10 * n),
                    predicted_tokens_per_second=100.0,
                    speed=100.0 * 2**n,
                )
                for n in range(4)
            ),
            trial(4, predicted_step_seconds=5.0, step_seconds=None, predicted_tokens_per_second=None),
        )
    )
    steps, tokens, speed = found.scores
    assert (steps.stage, steps.count, steps.rank_correlation, steps.error, steps.ratio) == (
        "micro_benchmark",
        4,
        pytest.approx(1),
        1.0,
        2.0,
    )
    assert (tokens.count, tokens.rank_correlation) == (4, pytest.approx(-1))
    assert (speed.count, speed.rank_correlation) == (4, None)  # all predicted alike: there is no order
    assert speed.error == pytest.approx((0.5 + 0.75) / 2)


def test_a_step_that_was_too_slow_to_go_on_still_scores_the_model() -> None:
    slow = replace(failed(1, "micro_benchmark", "slower"), predicted_step_seconds=3.0, step_seconds=1.0)
    (steps, _, speed) = study_report(study(trial(0), slow)).scores
    assert (steps.count, steps.ratio, speed.count) == (1, 3.0, 0)


def test_outcomes_are_counted_where_they_came() -> None:
    """Whoever enters a stage ends there or enters the next."""
    found = study_report(
        study(
            trial(0),
            failed(1, "feasibility", "infeasible"),
            failed(2, "numerics", "incorrect"),
            failed(3, "numerics", "compile"),
            failed(4, "decode", "timeout"),
            replace(trial(5), same_as=0),  # told of no new setting
            trial(6, outcome=None, stage="decode"),  # still running
        )
    )
    assert [s.stage for s in found.stages] == list(DECODING_STAGES)
    assert [s.entered for s in found.stages] == [5, 4, 2, 2, 1]
    assert [s.ended for s in found.stages] == [
        {"infeasible": 1},
        {"compile": 1, "incorrect": 1},
        {},
        {"timeout": 1},
        {"correct": 1},
    ]
    assert found.evaluations == 5


def test_the_curve_holds_improvements_of_what_is_allowed() -> None:
    mixed = {**trial(0).params, "mixing_weight": 0.5}
    trials = (
        trial(0, speed=100.0),
        trial(1, speed=900.0, params=mixed, divergence=0.02),  # fast, and not lossless
        failed(2, "numerics", "incorrect"),
        trial(3, speed=90.0),
        trial(4, speed=150.0, source="seed"),
    )
    found = study_report(study(*trials))
    assert [(i.evaluation, i.trial, i.seconds) for i in found.curve] == [(1, 0, 2.0), (5, 4, 10.0)]
    assert found.seconds == 10.0
    allowing = study_report(study(*trials, decision=decided(0.05)))
    assert [i.trial for i in allowing.curve] == [0, 1]
    unknown = study_report(study(replace(trials[0], spent_seconds=None), *trials[1:]))
    assert [i.seconds for i in unknown.curve] == [None, None]


def decided(max_divergence: float = 0.0) -> Decision:
    compared = Comparison(150.0, 100.0, 1.5, 1.4, 1.6, 8)
    return Decision(4, 0, 4, "faster than the default", compared, max_divergence, 5, "ridgepoint tune", "2026-01-01")


def test_what_the_models_choices_were_worth() -> None:
    """As many of either kind are compared, the first ones; and the best of all without the model's."""
    trials = (
        trial(0, speed=100.0, source="default"),
        trial(1, speed=300.0, source="seed"),
        trial(2, speed=200.0, source="seed"),
        trial(3, speed=400.0, source="seed"),  # the third: the search proposed two only
        trial(4, speed=150.0),
        trial(5, speed=250.0),
    )
    found = study_report(study(*trials)).seeding
    assert (found.count, found.seeded, found.others) == (2, 300.0, 250.0)
    assert (found.best_trial, found.best_source, found.best, found.without) == (3, "seed", 400.0, 250.0)
    text = as_text(sections([study_report(study(*trials))]))
    assert "37.5% slower" in text and "The first 2 settings" not in text  # of two the best says nothing
    lossy = replace(trial(6, speed=900.0, source="guided"), params=trial(6).params | {"mixing_weight": 0.5})
    told = study_report(study(*trials, lossy)).seeding.sources
    assert [(s.source, s.settings, s.allowed, s.tokens_per_second) for s in told] == [
        ("default", 1, 1, 100.0),
        ("seed", 3, 3, 400.0),
        ("search", 2, 2, 250.0),
        ("guided", 1, 0, None),
    ]
    many = [trial(n, speed=100.0 + n, source="seed" if n % 2 else "search") for n in range(10)]
    assert "The first 5 settings that the model chose came to 109 tokens/s" in as_text(
        sections([study_report(study(*many))])
    )
    found = study_report(study(*(replace(t, source="pilot") for t in trials))).seeding
    assert (found.count, found.seeded, found.others, found.without) == (0, None, None, 400.0)
    assert study_report(study(failed(0, "decode", "runtime"))).seeding.best is None


def test_importances_find_the_parameter_that_decides() -> None:
    """Speed that follows K alone: K has the largest share; conditions that others set do not hide it."""
    settings = [trial(n, k=1 + n % 24, speed=100.0 + 10 * (n % 24), source="search") for n in range(48)]
    plain_ones: list[dict[str, Value]] = [
        {"sampler": "autoregressive", "experts_single": mode, "threads": t}
        for mode in ("loop", "grouped")
        for t in (1, 2)
    ]
    settings += [trial(48 + i, params=params, speed=90.0) for i, params in enumerate(plain_ones)]
    found = study_report(study(*settings))
    assert found.importances[0].parameter == "draft_tokens" and found.importances[0].settings == 48
    assert sum(i.share for i in found.importances) == pytest.approx(1)
    assert 5 <= (found.top_share or 0) * 52 <= 6
    few = study_report(study(*settings[:5]))
    assert few.importances == () and "5 settings ran" in few.importances_missing


def test_the_report_is_plain_data() -> None:
    found = json.loads(json.dumps(info([study(trial(0), trial(1), decision=decided())])))
    (only,) = found["studies"]
    assert only["name"] == "made-up batch=1" and only["kept_default"] is False and found["tilings"] == []
    assert [t["number"] for t in only["front"]] == [0]


class Balanced(HTMLParser):
    """Notes elements that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_says_the_same(ending: str, tmp_path: Path) -> None:
    """Each number of the text is in the others, and no name can break out of its place."""
    result = replace(study(*(trial(n, k=n + 1) for n in range(12)), decision=decided()), name="<b>a|b_c*</b>")
    parts = sections([study_report(replace(result, subject=replace(SUBJECT, simulated="random weights")))])
    path = write(parts, tmp_path / f"report{ending}")
    page = path.read_text()
    if ending == ".html":
        reader = Balanced()
        reader.feed(page)
        assert reader.open == [] and "<b>a|b_c*</b>" in "".join(reader.text) and "<b>a" not in page
    if ending == ".md":
        assert "<b>" not in page and "a\\|b\\_c\\*" in page
        for table in re.findall(r"(?:^\|.*\n?)+", page, flags=re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    for number in re.findall(r"\d[\d.,]*\d", as_text(parts)):
        assert number in page
    assert "random weights" in page


def test_a_report_goes_into_a_known_format_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.pdf'; known: .html, .md, .txt"):
        write([], tmp_path / "report.pdf")
    assert as_html([]) and as_markdown([Section("A", ("b",))]) == "## A\n\nb\n"


def test_a_sparkline_rises_with_its_values() -> None:
    assert sparkline([1, 4, 8]) == "▁▅█" or sparkline([1, 4, 8]) == "▂▅█"
    assert sparkline([]) == sparkline([0.0]) == ""


# --- effort and budget


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("1h30m", 5400), ("45", 45), ("0.5m", 30)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "15 minutes", "-3m", "0s", "m", "1d", "3m2", "1e9s", "inf"])
def test_bad_durations_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="duration"):
        duration_seconds(text)


def test_efforts_rise_and_options_replace_their_fields() -> None:
    rows = [tuple(vars(e).values()) for e in (EFFORTS["quick"], EFFORTS["standard"], EFFORTS["thorough"])]
    assert all(a < b for lower, higher in pairwise(rows) for a, b in zip(lower, higher, strict=True))
    chosen = effort("quick").with_options(trials=3, seconds=None, rounds=9)
    assert (chosen.trials, chosen.rounds, chosen.seconds) == (3, 9, EFFORTS["quick"].seconds)
    with pytest.raises(UserError, match=r"unknown effort 'lazy'; known: quick, standard, thorough"):
        effort("lazy")
    for bad in ({"trials": 0}, {"seconds": -1.0}, {"trial_seconds": 0.0}, {"seconds": float("nan")}):
        with pytest.raises(UserError, match=f"{next(iter(bad))} > ?=? ?[01]"):
            effort("quick").with_options(**bad)


def test_the_presets_are_documented() -> None:
    """docs/tuning.md: a row per option, a column per preset."""
    page = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text()
    for name in vars(EFFORTS["quick"]):
        figures = " | ".join(f"{getattr(e, name):g}" for e in EFFORTS.values())
        assert re.search(rf"\(`--{name.replace('_', '-')}`\) \| {re.escape(figures)} \|", page), name


def test_a_budget_is_shared_over_what_is_left_to_do() -> None:
    """Who ends early leaves the rest to the others, and the shares never come to more than there is."""
    now = 100.0
    budget = Budget(90.0, clock=lambda: now)
    assert budget.share(3) == 30
    now += 10.0  # the first took 10 of its 30
    assert budget.share(2) == 40
    now += 60.0  # the second took more than its share
    assert budget.share(1) == budget.left_seconds == 20
    now += 30.0
    assert budget.left_seconds == 0 and (budget.share(1) or 0) > 0  # a last bucket can still decide
    assert Budget(None).share(2) is None is Budget(None).left_seconds
    assert earlier(None, 5.0, 3.0) == 3.0 and earlier(None, None) is None


class Slow(MadeUp):
    """On a clock of its own, which measuring alone moves on."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        record, outputs = super().measure(candidate)
        self.now += sum(record.seconds)
        return record, outputs

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        found = super().pair(default, candidate)
        self.now += sum(1000 / speed for speed in found)
        return found


@pytest.mark.parametrize(("seconds", "least", "most"), [(60.0, 1, 1), (255.0, 2, 15), (1000.0, 16, 16)])
def test_the_decision_fits_into_the_time(
    seconds: float, least: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of the default takes 9 made-up seconds: 8 rounds of it and of a slower one keep back about 200."""
    runner = Slow()
    monkeypatch.setattr("autotune.study.time", runner)
    with unsynced():
        found = run(tmp_path, runner, subject(space=small_space()), trials=16, seconds=seconds, rounds=8)
    assert found.decision and least <= len(found.measured) <= most
    assert runner.now <= seconds
