"""The demo, small but whole: every stage on a tiny model, every artefact read back, every failure one line."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ridgepoint
from autotune.storage import read_studies
from dashboards import plan as plans
from dashboards.choice import Choice
from dashboards.demo import run, summary
from dashboards.plan import ARTEFACTS, QUICK, Grid, Plan, commands
from dashboards.report import Results
from hardware.files import UserError
from hardware.profile import load_profile, save_profile
from perfmodel.engine import load_engine
from perfmodel.validation import point_name
from runtime.checkpoint import load_model, random_model, save_model
from runtime.deployment import load_deployment
from runtime.engine import generate
from runtime.measurement import read_jsonl
from runtime.tokenizer import BOS
from tests.test_report import Page, machine, tiny

SMALL = Plan(
    fitted=Grid((1, 4), (1, 3, 9), (8, 24)),
    held_out=Grid((1, 2), (1, 5), (16,)),
    repeats=2,
    batches=(1, 2),
    prompts=2,
    new_tokens=8,
    rounds=2,
    answer_tokens=8,
    tuning_seconds=60.0,
    tuning_trials=5,
    tuning_prompts=2,
    tuning_repeats=1,
    tuning_rounds=6,
)


@dataclass(frozen=True)
class Demo:
    """One finished demo."""

    out: Path
    model: Path
    results: Results
    shown: list[tuple[str, float, str]]


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(random_model(tiny(), seed=1), folder)
    return folder


@pytest.fixture(scope="module")
def demo(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("demo") / "out"
    shown: list[tuple[str, float, str]] = []
    results = run(
        out,
        str(checkpoint),
        SMALL,
        hardware=machine(),
        simulated="random weights",
        command="ridgepoint demo --quick",
        show=lambda stage, share, remark: shown.append((stage, share, remark)),
    )
    return Demo(out, checkpoint, results, shown)


def test_every_artefact_is_kept_and_readable(demo: Demo) -> None:
    assert {path.name for path in demo.out.iterdir()} - {"study.db.lock"} == set(ARTEFACTS)
    assert load_profile(demo.out / "hardware.yaml") == machine()
    fitted, held_out = read_jsonl(demo.out / "calibration.jsonl"), read_jsonl(demo.out / "held-out.jsonl")
    assert len(fitted) == 2 * 2 * 5  # batches, contexts; a decode, and a draft and a verify for each wider count
    assert len(held_out) == 2 * 1 * 3
    generations = read_jsonl(demo.out / "generations.jsonl")
    assert [(m.workload.batch, m.decoding.sampler) for m in generations] == [
        (batch, sampler) for batch in (1, 2) for sampler in ("autoregressive", "two_forward")
    ]
    for record in (*fitted, *held_out, *generations):
        assert record.simulated == "random weights"
        assert record.command == "ridgepoint demo --quick"
        assert record.kernels.threads == 1
    engine = load_engine(demo.out / "engine.yaml")
    assert engine.fit is not None
    assert set(engine.fit.points) == {point_name(m) for m in fitted}
    for name in ("predictions.json", "generated.json"):
        assert json.loads((demo.out / name).read_text())


def test_what_was_held_out_was_not_fitted_to(demo: Demo) -> None:
    kinds = [(row.kind, row.fitted) for row in demo.results.rows]
    assert kinds.count(("forward", True)) == 20
    assert kinds.count(("forward", False)) == 6
    assert kinds.count(("generation", False)) == 4
    assert all(row.bound_seconds <= row.predicted_seconds * (1 + 1e-9) for row in demo.results.rows)


def test_the_numbers_of_the_report_are_those_of_the_records(demo: Demo) -> None:
    for found in demo.results.speedups:
        rates = [
            statistics_of.tokens[0] / statistics_of.seconds[0]
            for statistics_of in (found.two_forward, found.autoregressive)
        ]
        ratios = [
            (a / b) / (c / d)
            for a, b, c, d in zip(
                found.two_forward.tokens,
                found.two_forward.seconds,
                found.autoregressive.tokens,
                found.autoregressive.seconds,
                strict=True,
            )
        ]
        assert min(ratios) <= found.low <= found.ratio <= found.high <= max(ratios)
        assert rates[0] / rates[1] == pytest.approx(ratios[0])
        assert found.predicted.chosen.acceptance_length == found.two_forward.acceptance_length
        assert found.predicted.chosen.context == found.two_forward.context


def test_the_deployment_is_followed(demo: Demo) -> None:
    (study,) = read_studies(demo.out)
    assert study.decision is not None
    assert study.subject.simulated == "random weights"
    deployment = load_deployment(demo.out / "deployment.yaml")
    assert deployment == demo.results.deployment
    assert deployment.rules[0].decoding == study.candidate(study.trial(study.decision.trial)).decoding
    assert demo.results.tuned.decoding == deployment.rules[0].decoding
    model = load_model(str(demo.model))
    prompt, text = demo.results.tuned.prompts[0], demo.results.tuned.texts[0]
    again = generate(model, [[BOS, *prompt.encode()]], demo.out / "deployment.yaml", max_new_tokens=SMALL.answer_tokens)
    assert bytes(t for t in again.tokens[0] if t < 256).decode("utf-8", errors="replace") == text


def test_the_report_is_written_and_labelled(demo: Demo) -> None:
    page = Page((demo.out / "report.html").read_text(encoding="utf-8"))
    assert all(reference.startswith("#") for reference in page.references)
    assert "Simulated: random weights." in page.text
    for what, command in demo.results.commands:
        assert what in page.text
        assert command in page.text
    for name in ARTEFACTS:
        assert name in page.text


def test_progress_runs_through_every_stage(demo: Demo) -> None:
    stages = list(dict.fromkeys(stage for stage, _, _ in demo.shown))
    assert stages == ["probe", "predict", "measure", "generate", "calibrate", "tune", "export and run", "report"]
    for stage in stages:
        shares = [share for name, share, _ in demo.shown if name == stage]
        assert all(0 <= share <= 1 + 1e-9 for share in shares)
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1.0) or stage == "tune"  # whose comparison may not be needed


def test_the_summary_is_plain(demo: Demo) -> None:
    found = json.loads(json.dumps(summary(demo.results, demo.out), allow_nan=False))
    assert all(Path(path).exists() for path in found["artefacts"].values())
    assert [s["batch"] for s in found["speedups"]] == [1, 2]
    assert found["validation"]["forward, held out"]["count"] == 6
    assert found["simulated"] == "random weights"


def options_of(path: list[str]) -> set[str]:
    """The options that a command of ours has."""
    command: Any = ridgepoint.command()
    for name in path:
        command = command.commands[name]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("plan", [Plan(), QUICK, SMALL])
def test_the_commands_that_repeat_it_exist(plan: Plan, demo: Demo) -> None:
    model = "a model's name"  # to be quoted
    for _, line in commands(model, plan, Choice(), "add 1+1", 1):
        words = shlex.split(line)
        assert words.pop(0) == "ridgepoint"
        path = [words.pop(0)]
        if path == ["hardware"]:
            path.append(words.pop(0))
        known = options_of(path)
        for word in words:
            assert not word.startswith("--") or word in known, line
        assert "--model" not in words or words[words.index("--model") + 1] in (model, "zaya1-8b")


def test_a_repeating_command_gives_what_the_demo_found(demo: Demo) -> None:
    """The comparison with predictions, as the report says to repeat it, on the demo's own files."""
    line = next(line for what, line in demo.results.commands if what.startswith("Compare"))
    words = [w.replace("repeat/", f"{demo.out}/") for w in shlex.split(line)[1:]]
    output = io.StringIO()
    with redirect_stdout(output):
        assert ridgepoint.main([*words, "--json"]) == 0
    found = json.loads(output.getvalue())["summary"]["forward, held out"]
    assert found["count"] == 6


@pytest.mark.parametrize("plan", [Plan(), QUICK, SMALL])
def test_plans_hold_points_out(plan: Plan) -> None:
    def points(grid: Grid) -> set[tuple[int, int, int]]:
        return {(batch, slots, context) for batch, context in grid.cells for slots in grid.slots}

    assert not points(plan.fitted) & points(plan.held_out)
    assert len(points(plan.fitted)) >= 10  # what a calibration needs
    most = max(batch * slots for batch, slots, _ in points(plan.fitted))  # expert coverage is recorded up to here
    assert max(batch * slots for batch, slots, _ in points(plan.held_out)) <= most
    drafting = 16 + 1
    assert max(plan.batches) * drafting <= most or plan is SMALL  # whose few experts are all read long before


def test_a_second_demo_replaces_the_first(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    for name in ARTEFACTS:
        (tmp_path / name).write_text("of an earlier demo")
    with pytest.raises(UserError, match="stop here"):
        run(tmp_path, str(demo.model), SMALL, hardware=machine(), show=_stop_at("measure"))
    assert (tmp_path / "mine.txt").read_text() == "kept"
    assert not (tmp_path / "report.html").exists()  # nothing stale stands beside new files
    assert len(read_jsonl(tmp_path / "calibration.jsonl")) >= 1  # and what was measured is kept at once


def _stop_at(stage: str) -> Any:
    def show(name: str, share: float, remark: str) -> None:
        if name == stage and share > 0.2:
            raise UserError("stop here")

    return show


def test_json_is_one_document(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(SMALL, batches=(1,), tuning_trials=1, held_out=Grid((1,), (1,), (16,)), repeats=1)
    monkeypatch.setattr(plans, "QUICK", small)
    save_profile(machine(), tmp_path / "machine.yaml")
    arguments = ["demo", "--quick", "--model", str(checkpoint), "--hardware", str(tmp_path / "machine.yaml"), "--json"]
    assert ridgepoint.main([*arguments, "--out", str(tmp_path / "out"), "--seconds", "0.01"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert Path(found["report"]).is_file()
    assert found["simulated"] is None
    assert "measure" in printed.err  # progress, also where there is no terminal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no-such-model"], "unknown model"),
        (["--seconds", "0"], "seconds > 0 must hold"),
        (["--hardware", "h100-sxm"], "the demo runs on the CPU"),
        (["--hardware", "abacus"], "unknown hardware 'abacus'"),
        (["--threads", "0"], "threads"),
        (["--out", "/dev/null/x"], "cannot write"),
    ],
)
def test_a_failure_is_one_line(
    options: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--quick", "--model", str(checkpoint), "--out", str(tmp_path / "out"), *options]
    assert ridgepoint.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_that_cannot_draft_or_is_too_short_is_refused(tmp_path: Path) -> None:
    save_model(random_model(replace(tiny(), mask_token_id=None), seed=1), tmp_path / "plain")
    with pytest.raises(UserError, match="no mask_token_id, so it cannot draft"):
        run(tmp_path / "out", str(tmp_path / "plain"), SMALL, hardware=machine())
    with pytest.raises(UserError, match="max_position_embeddings"):
        run(tmp_path / "out", str(tmp_path / "plain"), Plan(), hardware=machine())
