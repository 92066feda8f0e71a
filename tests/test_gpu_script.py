"""benchmarks/gpu.sh on this CPU: it needs few libraries, keeps every record, and survives parts that cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

import benchmarks.gpu as program
from benchmarks.gpu import PARTS, bandwidth_table, finish, main, run_parts, table
from benchmarks.gpu_parts import check_kernels, predict, shipped, slug, time_kernels
from benchmarks.gpu_session import FULL, RANDOM, SHRUNK, SMALL, Session, timed_problems
from benchmarks.gpu_speed import decode_by_transformers, forwards, load_transformers
from hardware.files import UserError
from hardware.probe import local_name
from hardware.profile import load_profile
from runtime.bench import Identity, identify
from runtime.checkpoint import random_model
from runtime.config import DecodingConfig, KernelConfig, Workload, replace
from runtime.engine import generate
from runtime.engines import engine_of
from runtime.kernels.problem import Problem
from runtime.kernels.registry import Kernel, kernel
from runtime.kernels.target import TARGETS, Tiling
from runtime.kernels.timing import Timed, Traffic
from runtime.measurement import ForwardKind, Measurement, append_jsonl, read_jsonl

ROOT = Path(__file__).parents[1]
ABSENT = ("typer", "rich", "optuna", "sqlalchemy", "tokenizers", "transformers", "streamlit", "plotly", "scipy")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of the script where a GPU machine's missing libraries are missing too, and no GPU is seen."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {ABSENT!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(folder),
        "OUT": "out",
        "MEASUREMENTS": "kept",
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    script = [str(ROOT / "benchmarks" / "gpu.sh")]
    run = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "4 checks, 0 failed" in run.stdout
    assert "no GPU here" in run.stderr
    return folder


def test_it_leaves_checks_a_profile_records_and_a_table(results: Path) -> None:
    out = results / "out"
    assert load_profile(str(out / "hardware.yaml")).name == local_name("cpu")
    checks = [json.loads(line) for line in (out / "correctness.jsonl").read_text().splitlines()]
    assert all(check["passed"] for check in checks)
    measured, whole = (read_jsonl(out / f"{name}.jsonl") for name in ("forwards", "generations"))
    engine = engine_of(random_model(SHRUNK).freeze())
    assert {(m.forward, m.workload.batch, m.kernels.engine) for m in measured} == {
        (kind, batch, by)
        for kind in ("decode", "draft", "verify", "single")
        for batch in SMALL.batches
        for by in (engine, "eager")
    }
    samplers = {(m.decoding.sampler, m.workload.batch) for m in whole}
    assert samplers == {(s, b) for s in ("autoregressive", "two_forward", "single_forward") for b in SMALL.batches}
    assert all(m.simulated == RANDOM and m.command.startswith("python -m benchmarks.gpu") for m in measured + whole)
    [beside] = [json.loads(line) for line in (out / "beside.jsonl").read_text().splitlines()]
    assert set(beside["seconds_per_token"]) == {engine, "eager"}
    operators = read_jsonl(out / "operators.jsonl")
    named = {"qkv", "cca", "attention", "output", "router", "experts", "lm_head", "sampler", "norms_residual"}
    assert {m.operator for m in operators} == named | {"embedding"}
    assert {(m.forward, m.workload.batch) for m in operators} == {(k, b) for k in ("decode", "verify") for b in (1, 2)}
    points = (out / "results.md").read_text().partition("\n\n")[0]
    assert points.count("ms |") == len(measured) + len(whole) + len(operators)
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    reasons = {"transformers", "bandwidth", "tilings", "tile table", "pairs", "prediction"}
    assert {s["point"].split(" of ")[0] for s in skipped} <= reasons
    trials = [json.loads(line) for line in (out / "decoding.jsonl").read_text().splitlines()]
    assert [t["source"] for t in trials] == ["default", "pilot", "seed"]
    assert all(t["outcome"] in ("correct", "slower") and t["divergence"] in (0.0, None) for t in trials)


def test_records_are_copied_to_the_devices_folder(results: Path) -> None:
    [folder] = (results / "kept").iterdir()
    for name in ("forwards.jsonl", "generations.jsonl", "correctness.jsonl", "results.md", "hardware.yaml"):
        assert (folder / name).read_bytes() == (results / "out" / name).read_bytes()
    assert "checks on cpu, 0 failed" in (folder / "kernels.txt").read_text()
    assert folder.name == slug(read_jsonl(folder / "forwards.jsonl")[0].device["device"])
    assert slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


def test_results_are_never_mixed(tmp_path: Path) -> None:
    (tmp_path / "forwards.jsonl").write_text("")
    with pytest.raises(UserError, match="holds results already"):
        main(["--out", str(tmp_path), "--device", "cpu", "--small"])
    with pytest.raises(UserError, match="unknown part 'everything'; known: engines, full, kernels"):
        main(["--out", str(tmp_path), "--device", "cpu", "--small", "--part", "everything"])


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("cpu", tmp_path, time.monotonic() + 100, "pytest")


@pytest.fixture(scope="module")
def identity() -> Identity:
    return identify(random_model(SHRUNK).freeze(), "tiny", "pytest", simulated=RANDOM)


def test_a_point_that_cannot_run_is_skipped_with_its_reason(
    session: Session, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here memory ends at batch 2: its points are lost, those of batch 1 and their records stay."""
    model = random_model(SHRUNK).freeze()
    whole = model.forward

    def limited(tokens: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        if tokens.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore lines")
        return whole(tokens, *rest, **options)

    monkeypatch.setattr(model, "forward", limited)
    for batch in (1, 2):
        forwards(session, replace(SMALL, context=5), model, identity, KernelConfig(), batch)
    assert {m.workload.batch for m in session.records("forwards")} == {1}
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB."
    assert session.lines("skipped") == [{"point": "prefill batch 2, context 5, eager", "reason": reason}]


def test_after_the_deadline_nothing_new_starts(session: Session) -> None:
    session.deadline = time.monotonic() - 1
    assert session.attempt("late", lambda: pytest.fail("it was started")) is None
    assert session.lines("skipped")[0]["reason"] == "out of time"


def test_a_kernels_error_is_a_skipped_point(session: Session) -> None:
    def too_large() -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    assert session.attempt("kernel", too_large) is None
    assert session.lines("skipped")[0]["reason"].startswith("OutOfResources: out of resource: shared memory")


def test_a_bug_fails_the_run_and_the_points_after_it_still_run(session: Session) -> None:
    assert session.attempt("buggy", lambda: {}["absent"]) is None
    assert session.attempt("next", lambda: 7) == 7
    [failed] = session.lines("correctness")
    assert failed == {"check": "buggy runs without a bug", "passed": False, "error": "KeyError('absent')"}
    assert finish(session, None) == 1


def test_a_part_that_hangs_is_ended_and_the_others_run(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time at all every part hangs: each is named as skipped, and no check means failure."""
    monkeypatch.setattr(program, "GRACE_SECONDS", 0.05)
    run_parts(session, ["--out", str(session.out), "--device", "cpu", "--small"], 0.0)
    assert [s["point"] for s in session.lines("skipped")] == [f"the rest of {name}" for name in PARTS]
    assert finish(session, None) == 1


def test_a_kernel_that_is_wrong_fails_its_check(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log is kept; a check that cannot even start is no success either."""
    monkeypatch.setattr("benchmarks.gpu_parts.sys.executable", "/bin/false")
    check_kernels(session, SMALL)
    [outcome] = session.lines("correctness")
    assert not outcome["passed"] and outcome["ended"] == "no output"
    assert finish(session, None) == 1


def test_the_same_weights_run_in_transformers() -> None:
    """What stands beside our engine decodes the same tokens, and loads them without a file of weights."""
    model = random_model(SHRUNK, seed=3).freeze()
    prompt = list(range(40, 60))
    seconds, tokens = decode_by_transformers(load_transformers(model), prompt, 6)
    assert tokens == generate(model, [prompt], DecodingConfig(), max_new_tokens=6).tokens[0]
    assert isinstance(seconds, float)


def test_every_kernel_that_is_timed_has_tilings_and_inputs_for_its_problems() -> None:
    named = timed_problems(FULL)
    assert {name for name, _ in named[:4]} == {"experts", "attention"}
    for name, problem in named:
        assert all(kernel(name).tilings(target, problem) for target in TARGETS.values())
    for name, problem in timed_problems(SMALL):
        kernel(name).reference()(**kernel(name).inputs(problem, torch.float32, "cpu"))


def test_defaults_are_timed_beside_a_copy(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of each problem; one that does not run has a line with its reason, and no row."""
    names = [name for name, _ in timed_problems(FULL)]

    def fake(k: Kernel, problem: Problem, dtype: str, device: str, tilings: list[Tiling], **_: Any) -> list[Timed]:
        [tiling] = tilings
        seconds, outcome = ((), "does not fit") if k.name == "router" else ((1e-5,), "")
        return [Timed(k.name, str(problem), dtype, tiling, Traffic(3 * 10**7, 1), seconds, 4e12, outcome)]

    monkeypatch.setattr("benchmarks.gpu_parts.time_tilings", fake)
    session.device = "cuda"
    time_kernels(session, FULL)
    lines = session.lines("bandwidth")
    assert [line["kernel"] for line in lines] == names
    rows = list(bandwidth_table(lines))[2:]
    assert len(rows) == len(names) - names.count("router")
    assert rows[0].endswith("| 10.00 us | 3000 | 75% |")


def record(kind: ForwardKind, batch: int, slots: int, seconds: float, **changed: Any) -> Measurement:
    values = {
        "kind": "forward",
        "model": "zaya1-8b",
        "model_hash": "h",
        "device": {"device": "NVIDIA H200"},
        "command": "c",
        "commit": "c",
        "date": "d",
        "workload": Workload(batch, dtype="bfloat16"),
        "decoding": DecodingConfig(),
        "kernels": KernelConfig(engine="graphs"),
        "slots": slots,
        "context": 1024,
        "seconds": (seconds,),
        "forward": kind,
    }
    return Measurement(**(values | changed))


def test_predicted_stands_beside_measured(session: Session) -> None:
    """By the device's data file; engines are predicted apart, and the table shows the error of every point."""
    for row in (record("decode", 1, 1, 1.0), record("verify", 8, 17, 2.0, kernels=KernelConfig())):
        append_jsonl(session.out / "forwards.jsonl", row)
    predict(session, FULL)
    found = session.lines("predicted")
    assert [(p["hardware"], p["measured_seconds"]) for p in found] == [("h200", 2.0), ("h200", 1.0)]
    assert all(0 < p["bound_seconds"] <= p["predicted_seconds"] < p["measured_seconds"] for p in found)
    predicted = {(p["hardware"], p["name"]): p["predicted_seconds"] for p in found}
    rows = list(table(session.records("forwards"), predicted))
    assert rows[0].endswith("| predicted, h200 | error |")
    assert rows[2].startswith("| graphs | decode | 1 | 1 | 1024 | 1000.000 ms | - |") and rows[2].endswith("% |")
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize(
    ("device", "expected"),
    [("NVIDIA H200", ["h200"]), ("NVIDIA GeForce RTX 4090", ["rtx-4090"]), ("AMD EPYC", [])],
)
def test_a_device_finds_its_data_file(device: str, expected: list[str]) -> None:
    assert shipped(device) == expected
