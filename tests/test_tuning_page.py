"""The page about tuning: studies read while they run, what is shown of them as data, and the page with its controls."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from streamlit.testing.v1 import AppTest

from autotune.objective import DECODING_STAGES, Outcome
from autotune.report import study_report
from autotune.results import StudyResult
from autotune.space import default_candidate
from autotune.storage import read_studies, storage_url
from autotune.study import tune
from autotune.watching import Watch, running
from dashboards import sweeps
from dashboards.studies import NOT_SET, StagesInfo, history_info, parallel_info, pareto_info, rank_info
from dashboards.study_figures import OUTCOMES, history_plot, parallel_plot, rank_plot, stages_plot
from dashboards.study_tables import (
    failed_columns,
    front_columns,
    history_columns,
    importance_columns,
    parallel_columns,
    rank_columns,
    score_columns,
    source_columns,
    stage_columns,
    trial_columns,
)
from hardware.files import UserError
from tests.made_up import MadeUp, oracle, run, small_space, subject, unsynced
from tests.postgres_server import PASSWORD, postgres_server
from tests.test_study_report import failed, study, trial
from tests.test_tilings import Device
from tests.test_tilings import tune as tune_tilings

SHIPPED = Path(__file__).parents[1] / "measurements" / "amd-epyc-2-cores" / "study.db"

# --- studies read while they run


def test_a_watched_study_is_what_is_read_anew_however_often_it_was_looked_at(tmp_path: Path) -> None:
    about = subject(space=small_space())
    watch = Watch(storage_url(tmp_path))
    with pytest.raises(UserError, match="`ridgepoint tune` makes one"):
        watch.contents()
    with unsynced():
        for trials in (1, 4):
            run(tmp_path, MadeUp(), about, trials=trials)
            (name,) = watch.contents().studies
            assert [watch.study(name)] == read_studies(tmp_path)
        run(tmp_path, MadeUp(batch=2), subject(batch=2, space=small_space(batch=2)), trials=2)
        assert watch.contents().studies == ("made-up batch=1", "made-up batch=2")
        (tmp_path / "study.db").unlink()  # and another one in its place, with the same numbers
        run(tmp_path, MadeUp(), about, trials=5)
    assert [watch.study(name)] == read_studies(tmp_path)
    with pytest.raises(UserError, match="study 'batch=2' is not there"):
        watch.study("batch=2")


def test_what_ships_is_read_and_nothing_is_written(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    file = place / "study.db"
    shutil.copy(SHIPPED, file)
    place.chmod(0o555)
    file.chmod(0o444)
    before = file.read_bytes(), file.stat().st_mtime_ns
    try:
        watch = Watch(storage_url(file))
        results = [watch.study(name) for name in watch.contents().studies]
    finally:
        place.chmod(0o755)
    assert sum(len(r.trials) for r in results) == 1458
    assert len(results) == 4 and all(r.decision for r in results) and not any(map(running, results))
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert os.listdir(place) == ["study.db"]


HALF_WRITTEN = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 5")
database.execute("BEGIN")
database.execute("UPDATE trial_user_attributes SET value_json = zeroblob(3000)")
os._exit(0)
"""


def test_what_a_killed_worker_left_half_written_is_taken_back(tmp_path: Path) -> None:
    with unsynced():
        run(tmp_path, MadeUp(), subject(space=small_space()), trials=4)
    whole = read_studies(tmp_path)
    subprocess.run([sys.executable, "-c", HALF_WRITTEN, tmp_path / "study.db"], check=True)
    assert (tmp_path / "study.db-journal").stat().st_size > 0
    assert read_studies(tmp_path) == whole


@pytest.mark.parametrize("kind", ["soon", "{}", '{"name": "IntDistribution", "attributes": {}}'])
def test_a_damaged_parameter_is_told_in_a_line(kind: str, tmp_path: Path) -> None:
    with unsynced():
        run(tmp_path, MadeUp(), subject(space=small_space()), trials=1)
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE trial_params SET distribution_json = ?", (kind,))
    database.close()
    with pytest.raises(UserError, match=r"parameter '.*' of a trial is damaged"):
        Watch(storage_url(tmp_path)).study("made-up batch=1")


def test_who_seems_to_run(shipped: StudyResult) -> None:
    last = max(datetime.fromisoformat(t.begun) for t in shipped.trials)
    soon, late = last + timedelta(minutes=1), last + timedelta(minutes=11)
    undecided = StudyResult(shipped.name, shipped.subject, shipped.trials)
    assert not running(shipped, soon)
    assert running(undecided, soon) and not running(undecided, late)
    assert not running(StudyResult(shipped.name, shipped.subject, ()), datetime.now(UTC))


@pytest.fixture(scope="module")
def shipped() -> StudyResult:
    return Watch(storage_url(SHIPPED)).study("zaya-nano batch=1 context=256")


# --- what is shown, as data

OUTCOME_NAMES = get_args(Outcome)


@pytest.fixture(scope="module")
def mixed() -> StudyResult:
    """A study with every outcome, predictions, and settings of three samplers."""
    ran = [
        replace(
            trial(0, source="default", params={"sampler": "autoregressive", "threads": 2, "experts_single": "loop"})
        ),
        replace(trial(1, k=3, source="pilot"), predicted_tokens_per_second=9999.0),
        *(replace(trial(n, k=n), predicted_tokens_per_second=50.0 + n) for n in range(2, 12)),
        replace(trial(12, k=8, speed=300.0), divergence=0.02, params={**trial(0, k=8).params, "mixing_weight": 0.5}),
    ]
    broken = [outcome for outcome in OUTCOME_NAMES if outcome != "correct"]
    ended = [
        replace(failed(20 + n, stage, outcome), reason=f"<b>{outcome}</b> of {stage}")
        for n, (outcome, stage) in enumerate(zip(broken, (*DECODING_STAGES, "decode"), strict=True))
    ]
    return study(*ran, *ended, replace(trial(40), same_as=1), trial(41, outcome=None))


def test_the_history_holds_every_setting_and_its_best_so_far(mixed: StudyResult, shipped: StudyResult) -> None:
    for result in (mixed, shipped):
        info = history_info(result, study_report(result))
        assert [p.trial for p in info.points] == [t.number for t in result.measured]
        assert [p.evaluation for p in info.points] == list(range(1, len(info.points) + 1))
        spent = [p.seconds for p in info.points if p.seconds is not None]
        assert spent == sorted(spent)
        allowed = {t.number: t.tokens_per_second or 0.0 for t in result.allowed(info.max_divergence)}
        best = 0.0
        for point in info.points:
            best = max(best, allowed.get(point.trial, 0.0))
            found = [b.tokens_per_second for b in info.best if b.evaluation <= point.evaluation]
            assert max(found, default=0.0) == best


def test_every_outcome_is_told_apart_by_more_than_its_colour(mixed: StudyResult) -> None:
    assert set(OUTCOMES) == set(OUTCOME_NAMES)
    for looks in zip(*OUTCOMES.values(), strict=True):
        assert len(set(looks)) == len(OUTCOMES)
    report = study_report(mixed)
    drawn = history_plot(history_info(mixed, report), "settings").data
    assert {t.name.split(" (")[0]: len(t.x) for t in drawn if t.mode == "markers"} == {
        outcome: sum(t.outcome == outcome for t in mixed.measured) for outcome in OUTCOME_NAMES
    }
    assert not any("<b>" in text for t in drawn for text in t.text or ())  # a reason is text, not HTML
    bars = stages_plot(StagesInfo(report.stages)).data
    assert len({bar.marker.pattern.shape for bar in bars if bar.name != "went on"}) == len(OUTCOME_NAMES)
    for place, stage in enumerate(report.stages):
        assert sum(bar.x[place] for bar in bars if place < len(bar.x)) == stage.entered
    failures = failed_columns(mixed)
    assert len(failures["reason"]) == len(OUTCOME_NAMES) - 1
    assert sorted(failures["outcome"]) == sorted(set(OUTCOME_NAMES) - {"correct"})


def test_the_models_rank_leaves_out_what_acceptance_was_counted_on(mixed: StudyResult) -> None:
    info = rank_info(mixed, study_report(mixed))
    assert [p.trial for p in info.points if p.counted_on] == [1]
    assert (info.count, info.correlation) == (10, pytest.approx(1))
    assert rank_info(study(trial(0)), study_report(study(trial(0)))).correlation is None
    drawn = {t.name: t.marker.symbol for t in rank_plot(info).data if t.mode == "markers"}
    assert drawn == {"pilot (1, the model uses them)": "circle-open", "search (10)": "diamond"}


def test_parallel_coordinates_keep_every_setting_beside_its_own_value(mixed: StudyResult, shipped: StudyResult) -> None:
    for result in (mixed, shipped):
        info = parallel_info(result)
        trials = [result.trial(number) for number in info.trials]
        assert len(trials) == len(result.correct)
        assert list(info.tokens_per_second) == sorted(info.tokens_per_second)
        kinds = {p.name: p for p in result.subject.space.parameters}
        assert {"sampler", "draft_tokens", "threads", "mixing_weight"} <= {a.name for a in info.axes}
        for axis in info.axes:
            if axis.name not in kinds:
                continue
            values = [t.params.get(axis.name) for t in trials]
            assert [v is None for v in axis.values] == [v is None for v in values]
            places: dict[object, list[float]] = {}
            for value, position in zip(axis.values, axis.positions, strict=True):
                places.setdefault(value, []).append(position)
            assert all(lower == sorted(lower) for lower in places.values())  # by speed, as the settings are
            ordered = sorted(places.values())
            assert all(max(a) < min(b) for a, b in pairwise(ordered))  # no two values share a place
            for tick, word in zip(axis.ticks, axis.words, strict=True):
                (value,) = (v for v, found in places.items() if min(found) <= tick <= max(found))
                assert (value is None) == (word == NOT_SET)
        figure = parallel_plot(info)
        assert figure.layout.xaxis.ticktext[-1] == "tokens/s"
        ends = [y for line in figure.data for x, y in zip(line.x, line.y, strict=True) if x == len(info.axes) - 1]
        assert len(ends) == len(trials) and ends == sorted(ends)  # each is drawn once, the fastest above the others
        assert all(0 <= y <= 1 for line in figure.data for y in line.y if y is not None)


def test_tables_have_every_setting_and_parameter(mixed: StudyResult) -> None:
    report = study_report(mixed)
    columns = trial_columns(mixed)
    assert {len(column) for column in columns.values()} == {len(mixed.measured)}
    assert {p.name for p in mixed.subject.space.parameters} <= set(columns)
    speeds = [speed or 0.0 for speed in columns["tokens/s"]]
    assert speeds == sorted(speeds, reverse=True)
    correct = len(mixed.correct)
    for found, rows in (
        (front_columns(pareto_info(mixed)), correct),
        (history_columns(history_info(mixed, report)), len(mixed.measured)),
        (parallel_columns(parallel_info(mixed)), correct),
        (importance_columns(report), len(report.importances)),
        (rank_columns(rank_info(mixed, report)), sum(t.predicted_tokens_per_second is not None for t in mixed.correct)),
        (score_columns(report), 3),
        (source_columns(report), len({t.source for t in mixed.measured})),
        (stage_columns(StagesInfo(report.stages)), len(OUTCOME_NAMES)),
    ):
        assert {len(column) for column in found.values()} == {rows} and rows
    assert sum(stage_columns(StagesInfo(report.stages))["ended"]) == len(mixed.measured)


# --- the page

Act = Callable[[AppTest], object]


def draw() -> None:
    from dashboards.views.tuning import page

    page()


def shown(**address: str) -> AppTest:
    at = AppTest.from_function(draw, default_timeout=60)
    for name, value in address.items():
        at.query_params[name] = value
    return at.run()


def address_of(at: AppTest) -> dict[str, str]:
    return {name: value if isinstance(value, str) else value[0] for name, value in at.query_params.items()}


def texts(at: AppTest) -> str:
    """Everything that the page says."""
    parts = (at.error, at.warning, at.info, at.caption, at.markdown, at.subheader, at.code)
    return "\n".join(str(element.value) for found in parts for element in found).replace("\\", "")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder to start from, no search by others, and no storage in the environment."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RIDGEPOINT_STORAGE", raising=False)
    monkeypatch.setattr(sweeps, "current", lambda: None)
    monkeypatch.setattr("dashboards.asking.WAIT_SECONDS", 60)  # a busy machine's database is slow
    return tmp_path / "here"


def test_the_study_that_ships_is_shown_with_every_control(shipped: StudyResult) -> None:
    at = shown()
    assert not at.error and not at.exception
    decision = shipped.decision
    assert decision is not None and decision.comparison is not None
    metrics = {m.label: m.value for m in at.metric}
    assert metrics["against default"] == f"{decision.comparison.ratio:.2f}x"
    assert metrics["default, tokens/s"] == f"{decision.comparison.default_tokens_per_second:,.0f}"
    assert metrics["to run"] == f"trial {decision.trial}"
    controls: list[tuple[str, Act]] = [
        ("progress=seconds", lambda at: at.selectbox("tuning-progress").set_value("seconds")),
        ("section=settings", lambda at: at.button_group("tuning-section").set_value("settings")),
        ("section=predictions", lambda at: at.button_group("tuning-section").set_value("predictions")),
        ("section=failures", lambda at: at.button_group("tuning-section").set_value("failures")),
        ("context=768", lambda at: at.selectbox("tuning-study").set_value("zaya-nano batch=8 context=768")),
    ]
    at.session_state["tuning-all"] = True  # unfolded
    for said, act in controls:
        act(at)
        at.run()
        assert not at.exception and not at.error
        if said == "section=settings":
            assert len(at.dataframe[0].value) == len(shipped.measured)
        name, value = said.split("=")
        assert value in address_of(at)["study" if name == "context" else name]
    again = shown(**address_of(at))
    assert texts(again) == texts(at) and "batch 8, up to 768 cached tokens" in texts(again)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ({"source": "postgresql://u:Zq@h/db"}, "a link names a study storage of this machine, but this one"),
        ({"study": "<b>none"}, "unknown study of this storage '<b>none'; known: zaya-nano batch=1"),
        ({"progress": "days"}, "unknown progress 'days'; known: seconds, settings"),
    ],
)
def test_an_impossible_address_is_named_in_a_line_and_a_study_is_shown(address: dict[str, str], said: str) -> None:
    at = shown(**address)
    (error,) = at.error
    assert said in error.value.replace("\\", "") and "\n" not in error.value and "Zq" not in error.value
    assert at.metric and not at.exception


def test_a_study_is_followed_while_its_worker_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about, place = subject(space=small_space(), simulated="**made up**"), folder / "runs" / "mine"
    with unsynced():
        run(place, MadeUp(), about, trials=2)
        with (place / "study.db.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # as a worker does
            at = shown(source="runs/mine")
            assert "Running: 2 settings tried so far" in texts(at) and "Simulated: **made up**." in texts(at)
        at.run()
        assert "Running" not in texts(at) and not at.error
        with monkeypatch.context() as changes:  # the worker ends while the page is drawn: it is run anew later only,
            changes.setattr(Watch, "running", lambda *_, found=[False, True]: found.pop())
            changes.setattr("streamlit.rerun", lambda: pytest.fail("the browser has not got this run's widgets yet"))
            assert not at.run().exception and "Running" in texts(at)
        run(place, MadeUp(), about, trials=5)
        at.run()
        assert "5 settings tried" in texts(at)
    (place / "study.db").write_bytes(b"no database" * 100)
    at.run()
    (error,) = at.error
    assert "cannot use the study storage" in error.value.replace("\\", "")
    (place / "study.db").unlink()
    at.run()
    (error,) = at.error
    assert "runs/mine is not there any more" in error.value.replace("\\", "") and at.metric
    assert address_of(at)["source"] == SHIPPED.parent.relative_to(SHIPPED.parents[2]).as_posix()


def test_a_search_is_started_followed_and_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[sweeps.SweepRequest] = []
    now: list[sweeps.Sweep] = []

    def start(request: sweeps.SweepRequest) -> sweeps.Sweep:
        wanted.append(request)
        place = Path("runs/dashboard/now")
        now.append(sweeps.Sweep(request, "ridgepoint tune", place, "running", 3, 100, 30.0, 60.0, "[x](y): 3 of 100"))
        return now[-1]

    monkeypatch.setattr(sweeps, "start", start)
    monkeypatch.setattr(sweeps, "current", lambda: now[-1] if now else None)
    monkeypatch.setattr(sweeps, "stop", lambda: now.append(replace(now[-1], state="stopped")))
    at = shown()
    at.number_input("tuning-context").set_value(8)
    at.button[0].click().run()
    assert "context > " in at.error[0].value.replace("\\", "") and not wanted  # refused in a line
    at.number_input("tuning-context").set_value(None)
    at.number_input("tuning-minutes").set_value(60.0)
    at.selectbox("tuning-effort").set_value("thorough")
    at.checkbox("tuning-lossless").uncheck().run()  # which would still choose a lossless one if nothing may differ
    assert at.number_input("tuning-divergence").value == 1.0
    at.number_input("tuning-divergence").set_value(2.5)
    at.button[0].click().run()
    assert wanted == [sweeps.SweepRequest(minutes=60.0, effort="thorough", lossless=False, max_divergence=0.025)]
    assert address_of(at)["source"] == "runs/dashboard/now"
    assert "The search is starting" in texts(at) and "[x](y): 3 of 100" in texts(at)
    with unsynced():
        run(folder / "runs" / "dashboard" / "now", MadeUp(), subject(space=small_space()), trials=2)
    at.run()
    assert at.metric and address_of(at)["study"] == "made-up batch=1"
    # What an earlier run has set, which did not draw it, is told to the browser: else it would show nothing chosen.
    assert at.button_group("tuning-section").proto.set_value
    at.button("tuning-stop").click().run()
    assert "was stopped; what it measured is kept" in texts(at) and at.metric


def test_searches_of_tilings_have_a_table(folder: Path) -> None:
    place = folder / "runs" / "tilings"
    with unsynced():
        run(place, MadeUp(), subject(space=small_space()), trials=2)
        tune_tilings(storage_url(place), Device([3.0, 2.0, 1.0]))
    at = shown(source="runs/tilings", section="tilings")
    (table,) = at.dataframe
    assert table.value["to run"].tolist() == ["PLACE 2"]
    assert table.value["against the default (x)"].tolist() == [pytest.approx(3)]
    assert not at.exception and not at.error


def test_a_database_is_opened_when_it_is_typed_and_its_password_is_told_nobody() -> None:
    with postgres_server() as server:
        url, about = server.create("studies"), subject(space=small_space())
        tune(url, about, MadeUp(), default=default_candidate(about.space, 2), predict=oracle, trials=3)
        at = shown(source="typed")
        assert not at.metric and "A link never opens such a place" in texts(at)
        at.text_input("tuning-place").set_value(url.replace(":a%2Fpass%40word", ""))
        for password, works in (("wrong", False), (PASSWORD, True)):
            at.text_input("tuning-password").set_value(password)
            at.button("tuning-open").click().run()
            assert bool(at.metric) == works and bool(at.error) != works
            assert at.text_input("tuning-password").value == ""
            assert password not in texts(at) and password not in str(at.query_params)
        assert at.selectbox("tuning-study").value == "made-up batch=1" and "3 settings tried" in texts(at)
        assert address_of(at)["source"] == "typed" and not shown(**address_of(at)).metric
        server.stop()
        at.run()
        assert at.error and not at.exception
