"""The tuner's commands on a recording, which needs neither a model nor time: what they print, refuse and keep."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import autotune.cli
import autotune.local
import autotune.tuning
import ridgepoint
from autotune.console import clock, progress
from autotune.effort import Budget
from autotune.export.targets import TARGETS
from autotune.local import Work
from autotune.replay import Recorded, Recording, Replay, write_recording
from autotune.results import StudyResult
from autotune.space import Space, Value, decoding_space
from autotune.storage import read_studies
from autotune.tiling_results import TilingDecision, TilingResult, TilingSubject, TilingTrial
from autotune.tiling_runner import TilingWork
from autotune.tuning import Request
from hardware.profile import save_profile
from runtime.checkpoint import save_model
from runtime.config import ENGINES
from runtime.deployment import load_deployment
from tests.made_up import MadeUp, oracle, subject, unsynced
from tests.models import TINY, noisy_model
from tests.perfmodel_cpu import made_up_cpu


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with unsynced():
        yield


TINY_TEXT = replace(TINY, vocab_size=264, pad_token_id=256, bos_token_id=257, eos_token_id=258, mask_token_id=259)
COARSE: dict[str, tuple[Value, ...]] = {
    "levels_count": (1,),
    "denoising_steps": (1, 4),
    "confidence_threshold": ("none",),
}


def coarse(space: Space) -> Space:
    """Of the numbers and choices only a few, as a recording has them."""
    kept = []
    for parameter in space.parameters:
        if parameter.kind == "choice" and parameter.name in COARSE:
            parameter = replace(parameter, choices=COARSE[parameter.name])
        elif parameter.name == "draft_tokens":
            parameter = replace(parameter, low=23)
        elif parameter.name == "mixing_weight":
            parameter = replace(parameter, step=0.25)
        if parameter.when and parameter.when[0] == "denoising_steps":
            parameter = replace(parameter, when=("denoising_steps", 4))
        if parameter.name.startswith("experts"):
            parameter = replace(parameter, choices=("lean",))
        kept.append(parameter)
    return replace(space, parameters=tuple(kept))


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every setting of a coarse space, two rounds of each."""
    space = coarse(decoding_space(batch=1, cores=2, engine="lean"))
    runner, settings = MadeUp(), []
    for candidate in space.grid():
        record, outputs = runner.measure(candidate)
        settings.append(
            Recorded(
                params=space.encode(candidate),
                samples=(1000 / record.seconds[0], runner.sample(candidate)),
                tokens=1000,
                forwards=1000,
                acceptance_histogram=record.acceptance_histogram,
                experts_per_layer=record.experts_per_layer,
                **runner.quality(outputs),
            )
        )
    path = tmp_path_factory.mktemp("recording") / "made-up.jsonl"
    write_recording(path, Recording(subject(space=space), "made up", "", "2026-01-01", tuple(settings)))
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        words = [str(a) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["ridgepoint", *words])
        code = ridgepoint.main(words)
        return code, *capsys.readouterr()

    return run


def test_from_a_recording_to_an_export(command: Any, recording: Path, tmp_path: Path) -> None:
    """tune, tune on, show, report, export: one JSON document each, from one folder."""
    tune = ("tune", "--replay", recording, "--effort", "quick", "--out", "run")
    code, out, err = command(*tune, "--trials", 8, "--json")
    assert code == 0, err
    (study,) = json.loads(out)["studies"]
    assert code == 0 and study["measured"] == 8 and study["subject"]["simulated"] == "replayed from made-up.jsonl"
    code, out, err = command(*tune, "--trials", 12)
    assert code == 0 and err == "" and "12 settings on abacus (simulated: replayed from" in out
    assert "study report run" in out and "export --format native --study run" in out
    (result,) = read_studies("run")
    keys = [result.subject.space.key(result.candidate(t)) for t in result.measured]
    assert len(keys) == 12 == len(set(keys))  # the first eight were not measured again

    code, out, err = command("study", "show", "run", "--json")
    assert (code, err) == (0, "") and json.loads(out)["studies"][0]["measured"] == 12
    code, out, err = command("study", "report", "run", "--json", "--out", "report.html")
    (told,) = json.loads(out)["studies"]
    assert (code, err) == (0, "") and told["evaluations"] == 12 and told["stages"][0]["entered"] == 12
    assert "made-up batch=1" in (tmp_path / "report.html").read_text()
    code, out, err = command("study", "report", "run/study.db")
    assert (code, err) == (0, "") and "Pareto front" in out and "without the model" in out
    code, out, err = command("study", "report", "run", "--out", "report.md")
    assert (code, out, err) == (0, "written: report.md\n", "")

    code, out, err = command("export", "--study", "run", "--json")
    assert (code, err) == (0, "") and json.loads(out)["paths"] == ["deployment.yaml"]
    policy = load_deployment(tmp_path / "deployment.yaml")
    assert policy.command == "ridgepoint export --study run --json"
    assert policy.rules[0].evidence["simulated"].startswith("replayed")
    code, out, err = command("export", "--study", "run", "--batch", "2")
    assert code == 2 and "known: made-up batch=1" in err


def ctrl_c(*_: object) -> None:
    raise KeyboardInterrupt


def terminated(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.parametrize("interrupt", [ctrl_c, terminated])
def test_an_interrupted_command_says_how_to_go_on(
    interrupt: Callable[..., None], command: Any, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    tune = ("tune", "--replay", recording, "--trials", 8, "--rounds", 6)
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "measure", interrupt)
        code, out, err = command(*tune)
    assert code == 130, err
    assert (code, out) == (130, "") and "runs/tune/study.db; the same command continues" in err
    code, out, _ = command(*tune, "--json")
    assert code == 0 and json.loads(out)["studies"][0]["measured"] == 8


def test_a_dry_run_looks_ahead_and_measures_nothing(
    command: Any, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space with its meanings, what the model expects (of the recorded device), and what the budget allows."""
    profile = tmp_path / "cpu.yaml"
    save_profile(made_up_cpu(threads=2), profile)
    monkeypatch.setattr("autotune.tuning.predicted_recording", lambda *_: oracle)
    monkeypatch.setattr("autotune.dry_run.predicted_recording", lambda *_: oracle)
    look = ("tune", "--replay", recording, "--out", "run", "--hardware", profile, "--dry-run", "--budget", "5m")
    code, out, err = command(*look, "--json")
    found = json.loads(out)
    (bucket,) = found["buckets"]
    assert (code, err, found["bucket_seconds"], found["tilings"]) == (0, "", 300.0, [])
    assert bucket["settings"] == len(recording.read_text().splitlines()) - 1 and bucket["measured"] == 0
    assert {"name", "values", "meaning", "condition"} <= set(bucket["space"][0])
    assert not (tmp_path / "run").exists()
    # Nothing verified is predicted before anything is known of the acceptance.
    assert {e["params"]["sampler"] for e in bucket["front"]} == {"autoregressive"}
    assert any("pilots" in note for note in bucket["notes"])

    assert command(*(word for word in look if word != "--dry-run"), "--trials", 8)[0] == 0
    code, out, err = command(*look, "--json")
    (bucket,) = json.loads(out)["buckets"]
    front = bucket["front"]
    assert bucket["measured"] == 8 and bucket["notes"] == [] and len(front) > 1
    for faster, slower in pairwise(front):
        assert faster["tokens_per_second"] >= slower["tokens_per_second"]
        assert faster["divergence"] > slower["divergence"]
    code, out, err = command(*look)
    assert (code, err) == (0, "") and "tokens/s" in out and "drafts per step, K" in out and "5:00" in out


def test_the_formats_are_listed(command: Any) -> None:
    code, out, _ = command("export", "--list", "--json")
    assert code == 0 and {f["name"] for f in json.loads(out)["formats"]} == set(TARGETS)
    code, out, _ = command("export", "--list")
    assert code == 0 and len(out.splitlines()) == len(TARGETS)
    assert all(t.loads in line for t, line in zip(TARGETS.values(), out.splitlines(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("tune --model gpt-17", ["gpt-17", "known"]),
        ("tune --batch 0", ["--batch", "0"]),
        ("tune --batch 1,x", ["--batch", "1,x"]),
        ("tune --trials 0", ["trials >= 1", "0"]),
        ("tune --storage nonsense", ["sqlite:///FILE"]),
        ("tune --kernels experts,abacus", ["unknown kernel 'abacus'", "experts"]),
        ("tune --acceptance-histogram 1,x", ["--acceptance-histogram", "1,x"]),
        ("tune --effort lazy", ["unknown effort 'lazy'", "quick, standard, thorough"]),
        ("tune --budget soon", ["90s, 15m, 2h", "'soon'"]),
        ("tune --what tiles", ["'tiles'", "known: both, decoding, tilings"]),
        ("tune --what tilings", ["--device cuda"]),
        ("tune --what both --device cpu", ["--device cuda"]),
        ("tune --routing uniform", ["--routing", "--device cuda"]),
        ("tune --kernels experts", ["--kernels", "--device cuda"]),
        ("tune --device abacus", ["'abacus'", "cpu, cuda, cuda:N"]),
        ("tune --context 128,x", ["--context", "128,x"]),
        ("tune --context 64,64", ["--context", "64,64"]),
        ("tune --trial-seconds 0", ["trial_seconds > 0"]),
        ("tune --rounds 2 --replay {}", ["rounds >= 6", "2"]),
        ("tune --max-divergence -0.1", ["max_divergence >= 0"]),
        ("tune --replay nowhere.jsonl", ["nowhere.jsonl"]),
        ("tune --replay {} --replay-pace -1", ["pace >= 0"]),
        ("tune --replay {} --batch 8", ["--batch", "recording"]),
        ("tune --replay {} --device cuda", ["--device", "recording"]),
        ("tune --replay {} --random-weights", ["--random-weights", "recording"]),
        ("tune --replay {} --routing uniform", ["--routing", "recording"]),
        ("tune --workers many", ["--workers", "'many'"]),
        ("tune --workers 2 --replay {}", ["SQLite serves one worker", "postgresql://"]),
        ("tune --workers 2", ["must not time each other"]),
        ("study show nowhere", ["nowhere/study.db", "ridgepoint tune"]),
        ("study report nowhere", ["nowhere/study.db"]),
        ("export --study nowhere", ["nowhere/study.db"]),
        ("study report nowhere --out report.pdf", ["'.pdf'", "known: .html, .md, .txt"]),
        ("export", ["--study"]),
        ("export --format abacus", ["'abacus'", "known: ", "native"]),
    ],
)
def test_bad_input_is_one_line(arguments: str, parts: list[str], command: Any, recording: Path, tmp_path: Path) -> None:
    """... before anything is probed, started or written."""
    code, out, err = command(*arguments.format(recording).split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(part in err for part in parts), err
    assert not [p for p in tmp_path.rglob("*") if p.suffix not in (".lock", ".db")]


def test_every_batch_meets_every_context(recording: Path) -> None:
    request = Request(effort=autotune.cli.effort("quick"), batches=(1, 8), contexts=(128, 768))
    assert request.buckets == [(1, 128), (1, 768), (8, 128), (8, 768)]
    assert replace(request, contexts=()).buckets == [(1, None), (8, None)]
    assert (request.decoding, request.tilings) == (True, False)
    on_gpu = replace(request, device="cuda:1")
    assert (on_gpu.decoding, on_gpu.tilings) == (True, True)
    assert (replace(on_gpu, what="tilings").decoding, replace(on_gpu, what="decoding").tilings) == (False, False)


def test_workers_get_the_command_and_no_password_on_it(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own GPU, the storage by the environment; the parent prints what the study then holds."""
    ran: list[tuple[Sequence[Sequence[str]], Sequence[Mapping[str, str]]]] = []

    def run_workers(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]) -> int:
        ran.append((commands, environments))
        return 0

    url = "postgresql://tuner:se:cret@host:5432/studies"
    monkeypatch.setattr("autotune.workers.visible_gpus", lambda: [{"CUDA_VISIBLE_DEVICES": str(n)} for n in range(3)])
    monkeypatch.setattr("autotune.workers.run_workers", run_workers)
    monkeypatch.setattr(autotune.cli, "_read", lambda source: ([], []))
    words = ["tune", "--device", "cuda", "--batch=1,8", "--seed", "3", "--storage", url, "--workers=auto"]
    code, out, err = command(*words, "--json")
    assert code == 0 and json.loads(out)["studies"] == [] and "cret" not in out + err
    ((commands, environments),) = ran
    assert len(commands) == 3 and len(set(map(tuple, commands))) == 1
    assert commands[0][2:] == ["tune", "--device", "cuda", "--batch=1,8", "--seed", "3", "--json", "--workers", "1"]
    assert Path(commands[0][1]).name == "ridgepoint.py" and Path(commands[0][1]).is_file()
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0", "1", "2"]
    assert {e["RIDGEPOINT_STORAGE"] for e in environments} == {url}
    recorded = {e["RIDGEPOINT_COMMAND"] for e in environments}  # what was typed, but for the password
    assert recorded == {shlex.join(["ridgepoint", *words, "--json"]).replace(url, f"'{url.replace('se:cret', '***')}'")}
    monkeypatch.setenv("RIDGEPOINT_COMMAND", "ridgepoint tune --workers 3")
    assert autotune.cli._command() == "ridgepoint tune --workers 3"


@pytest.mark.parametrize("code", [130, 2])
def test_the_worst_exit_code_of_the_workers_is_the_commands(
    code: int, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.workers.visible_gpus", lambda: [{}, {}])
    monkeypatch.setattr("autotune.workers.run_workers", lambda commands, environments: code)
    monkeypatch.setattr(autotune.cli, "_read", lambda source: ([], []))
    words = ("tune", "--device", "cuda", "--storage", "postgresql://host/studies", "--workers", "2")
    found, _, err = command(*words)
    assert found == code and ("the same command continues" in err) == (code == 130)


def test_the_budget_is_shared_over_the_buckets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each bucket gets its fair share of what is left, and no more than its effort says."""
    now, given = 0.0, list[float | None]()

    def decoded(request: Request, url: str, work: Work, seconds: float, *_: Any) -> StudyResult:
        nonlocal now
        given.append(seconds)
        now += 10.0 if work.batch == 1 else seconds
        return None  # type: ignore[return-value]

    monkeypatch.setattr(autotune.tuning, "_decoded", decoded)
    monkeypatch.setattr(autotune.tuning, "profile_of", lambda *_: None)
    request = Request(effort=autotune.cli.effort("quick").with_options(seconds=70.0), batches=(1, 2, 4))
    budget = Budget(150.0, clock=lambda: now)
    autotune.tuning.run(request, "sqlite://", tmp_path, None, budget, "")  # type: ignore[arg-type]
    assert given == [50.0, 70.0, 70.0]  # 150 / 3; 140 / 2; what is left, and at most 70
    assert budget.left_seconds == 0


def tiled(kernel: str, slots: int, chosen: int) -> TilingResult:
    """A decided search, tiling 0 being the default."""
    about = TilingSubject(kernel, "zaya-nano", "0", {"device": "abacus"}, "bfloat16", 1, slots, 64, "recorded", "3.6.0")
    tilings = [{"BLOCK": place} for place in range(3)]
    trials = [TilingTrial(n, t, "correct", "micro_benchmark", "", 1.0 + n, (3.0 - n,)) for n, t in enumerate(tilings)]
    kept = chosen == 0
    decision = TilingDecision(tilings[chosen], tilings[0], 1.5, 1.4, 1.6, 20, "faster", kept, "", "2026-01-01")
    return TilingResult(about.name, about, tuple(trials), decision)


def test_a_gpu_tunes_tilings_first_and_decodes_with_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half of the budget each; every kernel at every token count that samplers send, on the model's own routes."""
    now, works, decoded = 0.0, list[TilingWork](), list[tuple[Work, float]]()

    def tune_tilings(url: str, work: TilingWork, *, seconds: float, **_: Any) -> TilingResult:
        nonlocal now
        works.append(work)
        now += seconds
        return tiled(work.kernel, work.slots, chosen=1 if work.kernel != "cca" and work.slots == 17 else 0)

    monkeypatch.setattr("autotune.tilings.tune_tilings", tune_tilings)
    monkeypatch.setattr(autotune.tuning, "profile_of", lambda *_: None)
    monkeypatch.setattr(
        autotune.tuning, "_decoded", lambda request, url, work, seconds, *_: decoded.append((work, seconds))
    )
    kernels = ("experts", "grouped_experts", "cca")
    request = Request(effort=autotune.cli.effort("quick"), device="cuda", kernels=kernels, contexts=(256, 512))
    budget = Budget(40.0, clock=lambda: now)
    with progress(budget, quiet=True) as show:
        found = autotune.tuning.run(request, "sqlite://", tmp_path, show, budget, "")
    tokens = sorted({w.problem.tokens for w in works})
    assert tokens == [1, 5, 9, 17, 25, 51] and len(works) == 3 * len(tokens) == len(found.tilings)
    assert {w.routing for w in works} == {"recorded:zaya-nano"} and {w.context for w in works} == {512}
    assert all(w.decoding is not None and w.decoding.slots == w.slots for w in works)
    # Where the default stays it is said beside a change of the same kernel: else the larger bucket's would serve there.
    # Another engine's kernel is not ours to run, and one that changed nowhere is left out.
    table = {"experts": {t: {"BLOCK": int(t == 17)} for t in tokens}}
    assert [(w.context, w.tilings) for w, _ in decoded] == [(256, table), (512, table)]
    assert [seconds for _, seconds in decoded] == [10.0, 20.0] and now == pytest.approx(20.0)
    made_up = replace(request, random_weights=True, model="zaya1-8b", batches=(64,))
    assert {w.routing for w in autotune.tuning.tiling_works(made_up)} == {"uniform"}


def test_a_dry_run_of_tilings_alone_says_whose_routes_they_are_timed_on(command: Any) -> None:
    """And nothing of decoding, which is not searched."""
    code, out, _ = command(
        *("tune", "--dry-run", "--device", "cuda", "--what", "tilings", "--model", "zaya1-8b", "--random-weights")
    )
    assert code == 0 and "routing uniform" in out and "bucket" not in out


def test_tilings_are_shown_and_reported(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune.cli, "_read", lambda source: ([], [tiled("experts", 5, 2)]))
    code, out, _ = command("study", "show", "run")
    assert code == 0 and out.startswith("zaya-nano experts tokens=5 bfloat16: BLOCK=2; 1.50x [1.40, 1.60]")
    code, out, _ = command("study", "report", "run", "--json")
    (told,) = json.loads(out)["tilings"]
    assert told["outcomes"] == {"correct": 3} and told["rank_correlation"] == pytest.approx(-1)
    assert told["tiling"] == {"BLOCK": 2} and told["default"] == {"BLOCK": 0}
    code, out, _ = command("study", "report", "run")
    assert code == 0 and "1.50x [1.40, 1.60]" in out and "Simulated" not in out
    made_up = tiled("experts", 5, 2)
    made_up = replace(made_up, subject=replace(made_up.subject, routing="uniform"))
    monkeypatch.setattr(autotune.cli, "_read", lambda source: ([], [made_up]))
    assert "Simulated: uniform routing." in command("study", "report", "run")[1]
    assert "(simulated: uniform routing)" in command("study", "show", "run")[1]


def test_why_an_engine_was_passed_over_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For all buckets together, and beside a bar that is not there as beside one that is."""

    def tune_local(*_: Any, on_open: Any, **options: Any) -> None:
        on_open(SimpleNamespace(engine="eager", remark="the engine lean needs [a] C compiler"))

    monkeypatch.setattr("autotune.local.tune_local", tune_local)
    monkeypatch.setattr(autotune.tuning, "profile_of", lambda *_: None)
    request = Request(effort=autotune.cli.effort("quick"), batches=(1, 2))
    budget = Budget(None)
    with progress(budget) as show:
        autotune.tuning.run(request, "sqlite://", tmp_path, show, budget, "")
    line = "ridgepoint: auto took the engine eager: the engine lean needs [a] C compiler\n"
    assert capsys.readouterr() == ("", line)


def test_times_are_shown_as_a_clock_does() -> None:
    assert [clock(s) for s in (0.4, 61, 3599.6, 3723)] == ["0:00", "1:01", "1:00:00", "1:02:03"]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_runs_is_no_profile(engine: str, command: Any, tmp_path: Path) -> None:
    """Before anything is probed or written; the line says where the name belongs."""
    code, out, said = command("tune", "--engine", engine)
    assert (code, out, len(said.splitlines())) == (2, "", 1) and not list(tmp_path.iterdir())
    assert f"got {engine!r}" in said and "--engine of bench and generate" in said


@pytest.mark.parametrize("words", [["--storage", "{}"], ["--storage={}"]])
def test_a_recorded_command_has_no_password(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = [word.format("postgresql://tuner:se:cret@host:5432/studies") for word in words]
    monkeypatch.setattr(sys, "argv", ["ridgepoint", "tune", *typed])
    recorded = autotune.cli._command()
    assert "cret" not in recorded and "postgresql://tuner:***@host:5432/studies" in recorded


def test_a_real_model_is_tuned_bucket_by_bucket(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command on a tiny model, in this process: that a child runs it is tested with the runner."""
    opened, profile = autotune.local._opened, tmp_path / "cpu.yaml"
    monkeypatch.setattr("autotune.local._opened", lambda work, seconds, isolated: opened(work, seconds, False))
    monkeypatch.setattr("autotune.local.core_count", lambda: 1)  # several busy threads take minutes on a busy machine
    save_profile(made_up_cpu(), profile)
    save_model(noisy_model(TINY_TEXT), tmp_path / "tiny")
    tune = ("tune", "--model", tmp_path / "tiny", "--hardware", profile, "--effort", "quick", "--lossless")
    tune += ("--prompts", 2, "--new-tokens", 4, "--trials", 2, "--batch", "2,1", "--context", "96")
    code, out, err = command(*tune, "--json")
    studies = json.loads(out)["studies"]
    assert (code, err, [s["name"] for s in studies]) == (0, "", ["tiny batch=2 context=96", "tiny batch=1 context=96"])
    assert all(s["measured"] == 2 and s["decision"]["reason"] for s in studies)
    assert all(s["decision"]["command"].startswith("ridgepoint tune --model") for s in studies)
    code, out, err = command("export", "--study", "runs/tune", "--batch", 2, "--context", 96)
    (rule,) = load_deployment(tmp_path / "deployment.yaml").rules
    assert (code, err) == (0, "") and (rule.max_batch, rule.max_context) == (2, 96)
