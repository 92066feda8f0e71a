"""From a tuning run to a file that the runtime follows, in Python and by the commands, with a real (tiny) model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import autotune.cli
import ridgepoint
from autotune.export import native
from autotune.export.targets import TARGETS, export
from autotune.local import Plan, Work, mixed_problems, tune_local
from autotune.objective import Comparison, Outputs, decoding_stages, run_stages
from autotune.results import Decision, StudyResult
from autotune.runner import LocalRunner
from autotune.space import Candidate, Value, decoding_space
from autotune.storage import read_studies, storage_url
from hardware.files import UserError
from hardware.profile import load_profile, save_profile
from runtime import generate, load_model
from runtime.bench import identify
from runtime.checkpoint import model_hash, save_model
from runtime.config import ENGINES, SAMPLER_NAMES, DecodingConfig, KernelConfig, ModelConfig, Sampler
from runtime.deployment import Rule, load_deployment, save_deployment
from tests.made_up import MadeUp, run, subject
from tests.models import TINY, noisy_model
from tests.perfmodel_cpu import made_up_cpu

CONFIG: ModelConfig = replace(
    TINY, vocab_size=264, pad_token_id=256, bos_token_id=257, eos_token_id=258, mask_token_id=259
)
PLAN = Plan(trials=4, rounds=6, lossless=True)
SMALL = ["--prompts", "2", "--new-tokens", "4", "--repeats", "1", "--rounds", "6", "--lossless"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as a checkpoint's folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(noisy_model(CONFIG), folder)
    return folder


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are not searched: several busy ones on a busy machine take minutes. Nor is a child started, which loads
    torch again: tests/test_runner.py has one."""
    monkeypatch.setattr("autotune.local.core_count", lambda: 1)
    monkeypatch.setattr("autotune.local.tune_local", partial(tune_local, isolated=False))


# --- decisions as a policy


def decided(folder: Path, batch: int) -> StudyResult:
    """Where drafting pays at batch 1 and not at batch 8."""
    about = subject(batch=batch, space=decoding_space(batch=batch, cores=2, lossless=True))
    return run(folder, MadeUp(batch=batch), about, trials=3)


def test_each_tuned_batch_is_a_rule_with_its_evidence(tmp_path: Path) -> None:
    results = [decided(tmp_path, batch) for batch in (8, 1)]
    path = export("native", results, tmp_path / "deployment.yaml", "ridgepoint export")
    found = load_deployment(path)
    assert found == replace(native.deployment(read_studies(tmp_path), "ridgepoint export"), created=found.created)
    assert [rule.max_batch for rule in found.rules] == [1, 8]
    assert (found.model, found.model_hash, found.fingerprint) == ("made-up", "0", results[0].subject.device)
    for result in results:
        decision, batch = result.decision, result.subject.workload.batch
        assert decision
        rule = found.rule_for(batch, 100)
        assert Candidate(rule.decoding, rule.kernels) == result.candidate(result.trial(decision.trial))
        assert rule.evidence["study"] == f"made-up batch={batch}" and rule.evidence["trial"] == decision.trial
        assert rule.decoding.drafts == (batch == 1)
        if batch == 1:
            compared = rule.evidence["comparison"]
            assert decision.comparison and compared["ratio"] == decision.comparison.ratio
            assert 1 < compared["ratio_low"] <= compared["ratio"] <= compared["ratio_high"]
    assert found.rule_for(3, 100) == found.rule_for(8, 100) == found.rule_for(100, 100)


def test_a_kept_default_is_exported_as_such(tmp_path: Path) -> None:
    result = decided(tmp_path, 1)
    assert result.decision
    lost = replace(
        result.decision,
        trial=result.decision.default_trial,
        comparison=Comparison(100.0, 99.0, 1.01, 0.97, 1.05, 8),
        reason="the gain over the default is inside the noise",
    )
    rule = native.deployment([replace(result, decision=lost)]).rules[0]
    assert rule.decoding == DecodingConfig()
    assert rule.evidence["comparison"]["challenger_trial"] == result.decision.challenger != rule.evidence["trial"]
    assert "noise" in rule.evidence["decision"]


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    result = decided(tmp_path, 1)
    with pytest.raises(UserError, match=r"unknown export format 'abacus'; known: native"):
        export("abacus", [result], tmp_path / "out")
    with pytest.raises(UserError, match="no decision yet"):
        export("native", [replace(result, decision=None)], tmp_path / "out")
    other = replace(result, subject=subject(model_hash="1"), name="other")
    with pytest.raises(UserError, match="one model on one device"):
        export("native", [result, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_samplers_settings_survive_the_policy(sampler: Sampler, checkpoint: Path, tmp_path: Path) -> None:
    """Every setting of the space that its sampler knows is written, read back equal, and followed by the runtime."""
    result = decided(tmp_path, 1)
    space = decoding_space(batch=1, cores=1)
    coarse: dict[str, tuple[Value, ...]] = {
        "draft_tokens": (5,),
        "mixing_weight": (1.0, 0.5),
        "experts_block": ("loop",),
        "experts_single": ("loop",),
    }
    candidates = [c for c in space.grid(coarse) if c.decoding.sampler == sampler]
    rules = tuple(Rule(*candidate) for candidate in candidates)
    policy = replace(native.deployment([result]), rules=rules)
    path = save_deployment(policy, tmp_path / "deployment.yaml")
    assert load_deployment(path) == policy
    model = load_model(str(checkpoint))
    followed = replace(policy, rules=rules[-1:], model_hash=model_hash(model))
    save_deployment(followed, path)
    found = generate(model, [[257, 65, 66]], path, max_new_tokens=7)
    assert found.decoding == candidates[-1].decoding
    assert found.tokens == generate(model, [[257, 65, 66]], candidates[-1].decoding, max_new_tokens=7).tokens


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_target_says_where_it_wrote(target: str, tmp_path: Path) -> None:
    path = export(target, [decided(tmp_path, 1)], tmp_path / "out")
    assert path.exists()


# --- with a real model


@pytest.mark.usefixtures("one_core")
def test_a_tuned_model_runs_as_exported(checkpoint: Path, tmp_path: Path) -> None:
    """Search, resume, export, generate: what runs is what was decided, and gives the autoregressive tokens."""
    work = Work(str(checkpoint), 2, prompts=2, new_tokens=6, repeats=1)
    url = storage_url(tmp_path)
    tune_local(work, url, made_up_cpu(), replace(PLAN, trials=2), command="first", isolated=False)
    result = tune_local(work, url, made_up_cpu(), PLAN, command="second", isolated=False)
    assert len(result.measured) == 4 and {t.outcome for t in result.measured} <= {"correct", "slower"}
    assert [t.source for t in result.measured] == ["default", "pilot", "seed", "seed"]
    assert all(t.predicted_tokens_per_second for t in result.measured if t.source != "pilot")
    assert all(t.divergence == 0 and t.tokens_per_second and sum(t.tokens) == 12 for t in result.correct)
    assert all(t.acceptance_length for t in result.measured if t.params["sampler"] == "two_forward")

    # A random model gains nothing from drafting: pretend it did, so that the export is not the default.
    drafting = next(t for t in result.measured if t.params["sampler"] == "two_forward")
    assert result.decision
    chosen: Decision = replace(result.decision, trial=drafting.number, challenger=drafting.number)
    path = export("native", [replace(result, decision=chosen)], tmp_path / "deployment.yaml")
    prompts = [[257, *p.prompt.encode()] for p in mixed_problems(2)]
    model = load_model(str(checkpoint))
    followed = generate(model, prompts, path, max_new_tokens=6)
    expected = result.candidate(drafting)
    assert followed.decoding == expected.decoding and followed.decoding.sampler == "two_forward"
    assert followed.kernels == expected.kernels
    assert followed.tokens == generate(model, prompts, DecodingConfig(), max_new_tokens=6).tokens
    other = noisy_model(CONFIG, seed=1)
    with pytest.raises(UserError, match="tuned for tiny"):
        generate(other, prompts, path, max_new_tokens=6)


def test_the_runner_leaves_the_model_as_it_was(checkpoint: Path) -> None:
    """... judges with the default kernels, and refuses what cannot run before running it."""
    model = load_model(str(checkpoint))
    before = (model.kernels.experts, torch.get_num_threads())
    prompts = [[257, 1, 2, 3], [257, 4]]
    runner = LocalRunner(model, identify(model, "tiny", ""), prompts, batch=1, max_new_tokens=5, repeats=2)
    candidate = Candidate(DecodingConfig("two_forward", draft_tokens=3), KernelConfig({1_000_000: "dense"}, threads=1))
    assert runner.infeasible(candidate) is None
    record, outputs = runner.measure(candidate)
    assert runner.quality(outputs) == {"divergence": 0.0}
    assert runner.quality([[9] * 5] * 2)["divergence"] > 0.5
    assert len(record.seconds) == 2 and record.tokens == (10, 10) and record.workload.batch == 1
    assert record.decoding == candidate.decoding and record.kernels == candidate.kernels
    assert min(runner.pair(candidate, candidate)) > 0
    assert (model.kernels.experts, torch.get_num_threads()) == before
    long = LocalRunner(model, identify(model, "tiny", ""), prompts, batch=1, max_new_tokens=1000)
    assert "positions" in (long.infeasible(candidate) or "")
    single = noisy_model(replace(CONFIG, mask_token_id=None))
    unmasked = LocalRunner(single, identify(single, "tiny", ""), prompts, batch=1, max_new_tokens=5)
    assert "mask_token_id" in (unmasked.infeasible(candidate) or "")
    with pytest.raises(UserError, match="fill batches of 3"):
        LocalRunner(model, identify(model, "tiny", ""), prompts, batch=3, max_new_tokens=5)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_sampler_goes_through_a_trial(sampler: Sampler, checkpoint: Path) -> None:
    """With a real model: lossless settings have no divergence, and one that claims to be and is not is found out."""
    model = load_model(str(checkpoint))
    prompts = [[257, 1, 2, 3], [257, 4]]
    runner = LocalRunner(model, identify(model, "tiny", ""), prompts, batch=2, max_new_tokens=9, repeats=1)
    coarse: dict[str, tuple[Value, ...]] = {
        "draft_tokens": (4,),
        "mixing_weight": (1.0,),
        "experts_block": ("loop",),
        "experts_single": ("loop",),
        "anchor_draft": (False,),
        "levels_count": (2,),
        "denoising_steps": (2,),
        "confidence_threshold": (0.9,),
    }
    for candidate in decoding_space(batch=2, cores=1).grid(coarse):
        if candidate.decoding.sampler != sampler:
            continue
        kept: dict[str, dict[str, object]] = {}
        found = run_stages(decoding_stages(candidate, runner, 0.0, 0.0), kept.__setitem__)
        assert found["outcome"] == "correct", found
        assert {"decode", "quality", "result"} <= set(kept) and found["tokens_per_second"] > 0
        assert (found["divergence"] == 0) == candidate.decoding.lossless  # a random model's drafts are never right

        class Wrong(LocalRunner):
            def quality(self, outputs: Outputs) -> dict[str, float]:
                return {"divergence": 0.5}

        wrong = Wrong(model, identify(model, "tiny", ""), prompts, batch=2, max_new_tokens=9, repeats=1)
        outcome = run_stages(decoding_stages(candidate, wrong, 0.0, 0.0), lambda *_: None)["outcome"]
        assert outcome == ("incorrect" if candidate.decoding.lossless else "correct")


def test_a_gpu_profile_does_not_predict_this_machine(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cpu is a cpu, but h100-sxm"):
        tune_local(Work(str(checkpoint)), storage_url(tmp_path), load_profile("h100-sxm"), PLAN)


def test_problems_are_mixed_and_always_the_same() -> None:
    found = mixed_problems(25)
    assert found == mixed_problems(25) and found[:7] == mixed_problems(7)
    families = [p.family for p in found]
    assert len(set(families[:10])) == 10 and len({p.prompt for p in found}) == 25


# --- the commands


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ridgepoint", *arguments])
    code = ridgepoint.main(arguments)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_runs_is_no_profile(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is probed or written; the line says where the name belongs."""
    code, out, said = command(capsys, monkeypatch, "tune", "--engine", engine, "--out", str(tmp_path / "runs"))
    assert (code, out, len(said.splitlines())) == (2, "", 1) and not (tmp_path / "runs").exists()
    assert f"got {engine!r}" in said and "--engine of bench and generate" in said


@pytest.mark.usefixtures("one_core")
def test_the_commands(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """tune, tune again, study show, export: one JSON document each, from one folder."""
    profile, folder = tmp_path / "cpu.yaml", str(tmp_path / "run")
    save_profile(made_up_cpu(), profile)
    tune = ["tune", "--model", str(checkpoint), "--hardware", str(profile), "--out", folder, *SMALL]
    code, out, _ = command(capsys, monkeypatch, *tune, "--batch", "2,1", "--trials", "2", "--json")
    assert code == 0
    found = json.loads(out)
    assert [s["name"] for s in found["studies"]] == ["tiny batch=2", "tiny batch=1"]
    assert all(s["measured"] == 2 and s["decision"]["reason"] for s in found["studies"])
    code, out, _ = command(capsys, monkeypatch, *tune, "--batch", "1", "--trials", "3")
    assert code == 0 and "3 settings" in out and f"--study {folder} --out deployment.yaml" in out
    code, out, err = command(capsys, monkeypatch, "study", "show", folder, "--json")
    shown = json.loads(out)
    assert (
        code == 0
        and err == ""
        and {s["name"]: s["measured"] for s in shown["studies"]}
        == {
            "tiny batch=1": 3,
            "tiny batch=2": 2,
        }
    )
    code, out, _ = command(capsys, monkeypatch, "study", "show", f"{folder}/study.db")
    assert code == 0 and "tiny batch=2" in out
    target = tmp_path / "policy.yaml"
    code, out, _ = command(capsys, monkeypatch, "export", "--study", folder, "--out", str(target), "--json")
    assert code == 0 and json.loads(out)["path"] == str(target)
    policy = load_deployment(target)
    assert [r.max_batch for r in policy.rules] == [1, 2] and policy.command.startswith("ridgepoint export")
    assert policy.rules[0].evidence["command"].startswith("ridgepoint tune --model")
    assert policy.command.endswith(f"export --study {folder} --out {target} --json")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tune", "--model", "gpt-17"], ["gpt-17", "known"]),
        (["tune", "--batch", "0"], ["--batch", "0"]),
        (["tune", "--batch", "1,x"], ["--batch", "1,x"]),
        (["tune", "--batch", "2,2"], ["--batch", "2,2"]),
        (["tune", "--trials", "0"], ["trials >= 1", "0"]),
        (["tune", "--storage", "nonsense"], ["sqlite:///FILE"]),
        (["study", "show", "nowhere"], ["nowhere/study.db", "ridgepoint tune"]),
        (["export", "--study", "nowhere"], ["nowhere/study.db"]),
        (["export", "--study", "nowhere", "--format", "abacus"], ["abacus", "known: native"]),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, monkeypatch, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(part in err for part in parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--storage", "{}"], ["--storage={}"]])
def test_a_recorded_command_has_no_password(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = [word.format("postgresql://tuner:se:cret@host:5432/studies") for word in words]
    monkeypatch.setattr(sys, "argv", ["ridgepoint", "tune", *typed])
    recorded = autotune.cli._command()
    assert "cret" not in recorded and "postgresql://tuner:***@host:5432/studies" in recorded


@pytest.mark.usefixtures("one_core")
def test_an_interrupted_command_says_how_to_go_on(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    profile = tmp_path / "cpu.yaml"
    save_profile(made_up_cpu(), profile)
    tune = ["tune", "--model", str(checkpoint), "--hardware", str(profile), "--out", str(tmp_path), *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(LocalRunner, "measure", interrupt)
        code, out, err = command(capsys, monkeypatch, *tune, "--trials", "2")
    assert code == 130 and out == "" and "the same command continues" in err
    assert command(capsys, monkeypatch, *tune, "--trials", "2")[0] == 0
