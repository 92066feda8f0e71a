"""benchmarks/gpu.sh on this CPU: it needs few libraries, keeps every record, and survives points that cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import LOSSLESS, RANDOM, SHRUNK, SMALL, Session, fastest_modes, forwards, main, slug, step_table
from hardware.files import UserError
from hardware.probe import local_name
from hardware.profile import load_profile
from runtime.bench import Identity, identify
from runtime.checkpoint import random_model
from runtime.config import SAMPLER_NAMES, DecodingConfig, KernelConfig, Workload, replace
from runtime.measurement import ForwardKind, Measurement, read_jsonl

ROOT = Path(__file__).parents[1]
ABSENT = ("typer", "rich", "optuna", "tokenizers", "transformers", "streamlit", "plotly", "scipy")


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
    assert f"{4 + 2 * len(LOSSLESS)} checks, 0 failed" in run.stdout
    assert "no GPU here" in run.stderr
    return folder


def test_it_leaves_a_profile_checks_records_and_a_table(results: Path) -> None:
    out = results / "out"
    assert load_profile(str(out / "hardware.yaml")).name == local_name("cpu")
    checks = json.loads((out / "correctness.json").read_text())
    assert all(check["passed"] for check in checks.values())
    measured = read_jsonl(out / "forwards.jsonl")
    kinds = {(m.forward, m.slots, m.workload.batch, next(iter(m.kernels.experts.values()))) for m in measured}
    assert len(kinds) == len(measured) == 4 * 2 * 4
    whole = read_jsonl(out / "generations.jsonl")
    assert (
        {m.decoding.sampler for m in whole} == set(SAMPLER_NAMES) == {"autoregressive", *(w.sampler for w in LOSSLESS)}
    )
    assert all(m.simulated == RANDOM and m.command.startswith("python -m benchmarks.gpu") for m in measured + whole)
    assert (out / "steps.md").read_text().count("\n") == 2 + 2
    assert not (out / "skipped.jsonl").exists()


def test_records_are_copied_to_the_devices_folder(results: Path) -> None:
    [folder] = (results / "kept").iterdir()
    for name in ("forwards.jsonl", "generations.jsonl", "correctness.json", "steps.md", "hardware.yaml"):
        assert (folder / name).read_bytes() == (results / "out" / name).read_bytes()
    assert folder.name == slug(read_jsonl(folder / "forwards.jsonl")[0].device["device"])
    assert slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


def test_results_are_never_mixed(tmp_path: Path) -> None:
    (tmp_path / "forwards.jsonl").write_text("")
    with pytest.raises(UserError, match="holds results already"):
        main(["--out", str(tmp_path), "--device", "cpu", "--small"])


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
    plan = replace(SMALL, draft_tokens=(4,), repeats=1)
    whole = model.forward

    def limited(tokens: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        if tokens.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore lines")
        return whole(tokens, *rest, **options)

    monkeypatch.setattr(model, "forward", limited)
    forwards(session, model, identity, replace(plan, contexts=(5,)))
    assert {m.workload.batch for m in read_jsonl(session.out / "forwards.jsonl")} == {1}
    assert session.skipped == [
        {
            "point": "prefill batch 2, context 5",
            "reason": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB.",
        }
    ]
    assert json.loads((session.out / "skipped.jsonl").read_text()) == session.skipped[0]


def test_after_the_deadline_nothing_new_starts(session: Session) -> None:
    session.deadline = time.monotonic() - 1
    assert session.attempt("late", lambda: pytest.fail("it was started")) is None
    assert session.skipped[0]["reason"] == "out of time"


def test_a_bug_is_no_skipped_point(session: Session) -> None:
    with pytest.raises(KeyError):
        session.attempt("buggy", lambda: {}["absent"])


def record(kind: ForwardKind, batch: int, slots: int, mode: str, seconds: float) -> Measurement:
    return Measurement(
        kind="forward",
        model="m",
        model_hash="h",
        device={},
        command="c",
        commit="c",
        date="d",
        workload=Workload(batch),
        decoding=DecodingConfig(),
        kernels=KernelConfig({1_000_000: mode}),  # type: ignore[dict-item]
        slots=slots,
        context=100,
        seconds=(seconds,),
        forward=kind,
    )


def test_the_table_takes_the_fastest_and_says_when_drafting_pays() -> None:
    records = [
        record("decode", 1, 1, "loop", 0.010),
        record("decode", 1, 1, "gather", 0.004),
        record("draft", 1, 5, "loop", 0.006),
        record("verify", 1, 5, "loop", 0.009),
        record("verify", 1, 5, "gather", 0.006),
        record("decode", 8, 1, "loop", 0.010),  # no draft at batch 8: no row
    ]
    rows = list(step_table(records))[2:]
    assert rows == ["| 100 | 1 | 4 | 4.00 ms | 6.00 ms | 6.00 ms | - | 3.00 | - |"]
    single = replace(record("single", 1, 25, "loop", 0.008), decoding=DecodingConfig("single_forward", 4))
    rows = list(step_table([*records, single]))[2:]
    assert rows == ["| 100 | 1 | 4 | 4.00 ms | 6.00 ms | 6.00 ms | 8.00 ms | 3.00 | 2.00 |"]
    kernels = fastest_modes(records)
    assert kernels.expert_mode(1) == "gather"
    assert kernels.expert_mode(5) == "loop"  # gather was not measured at every point of this size
    assert kernels.expert_mode(8) == "loop"
    assert fastest_modes([]) == KernelConfig()
