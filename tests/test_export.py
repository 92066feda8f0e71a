"""From a decision to a file that the runtime follows, with a made-up machine and with a real (tiny) model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ridgepoint
from autotune.export import native
from autotune.export.targets import TARGETS, write
from autotune.local import Plan, Work, load, tune_local
from autotune.objective import Comparison
from autotune.results import Decision
from autotune.space import Candidate, Value, decoding_space
from autotune.storage import read_studies, storage_url
from hardware.files import UserError
from hardware.fingerprint import fingerprint
from runtime import generate, load_model
from runtime.checkpoint import model_hash, save_model
from runtime.config import SAMPLER_NAMES, DecodingConfig, KernelConfig, ModelConfig, Sampler
from runtime.deployment import Deployment, Rule, load_deployment, rule_for, save_deployment
from runtime.policy import device_of
from tests.export_policies import policy, study
from tests.made_up import MadeUp, run, subject
from tests.models import TINY, noisy_model
from tests.perfmodel_cpu import made_up_cpu

CONFIG: ModelConfig = replace(
    TINY, vocab_size=264, pad_token_id=256, bos_token_id=257, eos_token_id=258, mask_token_id=259
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as a checkpoint's folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(noisy_model(CONFIG), folder)
    return folder


# --- decisions as a policy


TWO_FORWARD = DecodingConfig("two_forward", draft_tokens=6)


def test_each_tuned_bucket_is_a_rule_with_its_evidence(tmp_path: Path) -> None:
    buckets = [(8, None, DecodingConfig()), (1, 768, TWO_FORWARD), (1, 128, TWO_FORWARD)]
    results = [study(decoding, batch=batch, context=context) for batch, context, decoding in buckets]
    (path,) = write("native", policy(*results), tmp_path / "deployment.yaml")
    found = load_deployment(path)
    assert [(rule.max_batch, rule.max_context) for rule in found.rules] == [(1, 128), (1, 768), (8, None)]
    about = results[0].subject
    assert (found.model, found.model_hash, found.fingerprint) == (about.model, about.model_hash, about.device)
    for result, (batch, context, decoding) in zip(results, buckets, strict=True):
        rule = found.rule_for(batch, context or 5000)
        assert (rule.decoding, rule.kernels) == (decoding, KernelConfig(engine="graphs"))
        assert rule.evidence["study"] == result.name and result.decision
        assert rule.evidence["command"] == result.decision.command
        assert rule.evidence["prefers"].startswith("two_forward" if decoding.drafts else "autoregressive decoding")
        if decoding.drafts:
            compared = rule.evidence["comparison"]
            assert (compared["ratio_low"], compared["ratio"], compared["ratio_high"]) == (1.9, 2.0, 2.1)


def test_a_study_is_exported_from_its_storage(tmp_path: Path) -> None:
    """What a search decided is what its storage says, and what the file says."""
    about = subject(space=decoding_space(batch=1, cores=2, lossless=True))
    result = run(tmp_path, MadeUp(), about, trials=6)
    (stored,) = read_studies(tmp_path)
    (rule,) = native.deployment(policy(stored)).rules
    assert result.decision and rule.evidence["trial"] == result.decision.trial
    assert Candidate(rule.decoding, rule.kernels) == result.candidate(result.trial(result.decision.trial))
    assert rule.evidence["settings_measured"] == 6 and rule.evidence["decision"] == result.decision.reason


def test_a_kept_default_is_exported_as_such() -> None:
    result = study(TWO_FORWARD)
    assert result.decision
    lost = replace(
        result.decision,
        trial=result.decision.default_trial,
        comparison=Comparison(100.0, 99.0, 1.01, 0.97, 1.05, 8),
        reason="the gain over the default is inside the noise",
    )
    rule = native.deployment(policy(replace(result, decision=lost))).rules[0]
    assert rule.decoding == DecodingConfig()
    assert rule.evidence["comparison"]["challenger_trial"] == result.decision.challenger != rule.evidence["trial"]
    assert "noise" in rule.evidence["decision"]


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    result = study(TWO_FORWARD)
    with pytest.raises(UserError, match=rf"unknown export format 'abacus'; known: {', '.join(sorted(TARGETS))}"):
        write("abacus", policy(result), tmp_path / "out")
    for change in ({"model_hash": "1"}, {"model": "other"}, {"device": {"device": "another abacus"}}):
        other = replace(result, subject=replace(result.subject, **change), name="other")
        with pytest.raises(UserError, match="one model on one device, but 'other' and"):
            write("native", policy(result, other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_samplers_settings_survive_the_policy(sampler: Sampler, checkpoint: Path, tmp_path: Path) -> None:
    """Every setting of the space that its sampler knows is written, read back equal, and followed by the runtime."""
    space = decoding_space(batch=1, cores=1)
    coarse: dict[str, tuple[Value, ...]] = {
        "draft_tokens": (5,),
        "mixing_weight": (1.0, 0.5),
        "experts_block": ("loop",),
        "experts_single": ("loop",),
    }
    candidates = [c for c in space.grid(coarse) if c.decoding.sampler == sampler]
    model = load_model(str(checkpoint))
    rules = tuple(Rule(*candidate) for candidate in candidates)
    found = Deployment("tiny", model_hash(model), device_of(model), rules, "now", "")
    path = save_deployment(found, tmp_path / "deployment.yaml")
    assert load_deployment(path) == found
    save_deployment(replace(found, rules=rules[-1:]), path)
    followed = generate(model, [[257, 65, 66]], path, max_new_tokens=7)
    assert followed.decoding == candidates[-1].decoding
    assert followed.tokens == generate(model, [[257, 65, 66]], candidates[-1].decoding, max_new_tokens=7).tokens


# --- which rule serves

BOUNDS = st.lists(
    st.tuples(st.none() | st.integers(1, 20), st.none() | st.integers(1, 20)), min_size=1, max_size=6, unique=True
)


@settings(max_examples=100, deadline=None)
@given(bounds=BOUNDS, batch=st.integers(1, 25), context=st.integers(1, 25))
def test_the_first_rule_that_holds_serves_else_the_largest(
    bounds: list[tuple[int | None, int | None]], batch: int, context: int
) -> None:
    rules = [Rule(DecodingConfig(), KernelConfig(), *bound) for bound in bounds]
    holds = [(b is None or batch <= b) and (c is None or context <= c) for b, c in bounds]
    found = rule_for(rules, batch, context)
    if any(holds):
        assert found is rules[holds.index(True)]
        return
    # Nothing holds both. What serves holds the batch, if any does, else it has the largest; then so for the context.
    batches = [b for b, _ in bounds]
    fitting = [b is None or batch <= b for b in batches]
    if any(fitting):
        assert found.max_batch is None or batch <= found.max_batch
    else:
        assert found.max_batch == max(b for b in batches if b is not None)
    served = min(batch, found.max_batch or batch)
    rivals = [r for r in rules if r.max_batch is None or served <= r.max_batch]
    assert all(r.max_context is not None for r in rivals if r.max_context != found.max_context) or (
        found.max_context is None or context <= found.max_context
    )


def test_beyond_the_tuned_buckets_the_largest_serve() -> None:
    rules = [Rule(DecodingConfig(), KernelConfig(), b, c) for b in (1, 8) for c in (128, 768)]
    for batch, context, place in [(1, 5, 0), (1, 500, 1), (1, 9000, 1), (4, 5, 2), (64, 5, 2), (64, 9000, 3)]:
        assert rule_for(rules, batch, context) is rules[place]


# --- with a real model


def test_a_tuned_model_runs_as_exported(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search, export, generate: what runs is what was decided, and gives the autoregressive tokens."""
    monkeypatch.setattr("autotune.local.core_count", lambda: 1)  # several busy threads on a busy machine take minutes
    work = Work(str(checkpoint), batch=2, prompts=2, new_tokens=6, repeats=1)
    plan = Plan(trials=4, rounds=6, lossless=True)
    result = tune_local(work, storage_url(tmp_path), made_up_cpu(), plan, command="tune", isolated=False)
    assert [t.outcome for t in result.measured] == ["correct"] * 4

    # A random model gains nothing from drafting: pretend it did, so that the export is not the default.
    drafting = next(t for t in result.measured if t.params["sampler"] == "two_forward")
    assert result.decision
    chosen: Decision = replace(result.decision, trial=drafting.number, challenger=drafting.number)
    (path,) = write("native", policy(replace(result, decision=chosen)), tmp_path / "deployment.yaml")
    tuned = load(str(checkpoint))
    prompts, model = [[257, 65, 66], [257, 67]], tuned.model
    followed = generate(model, prompts, path, max_new_tokens=6)
    expected = result.candidate(drafting)
    assert followed.decoding == expected.decoding and followed.decoding.sampler == "two_forward"
    assert followed.kernels == expected.kernels
    assert followed.tokens == generate(model, prompts, DecodingConfig(), max_new_tokens=6).tokens
    (table,) = write("step-times", policy(result), tmp_path / "steps.json")
    rows = json.loads(table.read_text())["rows"]
    assert len(rows) == 4 and all(row["measured_step_seconds"] > 0 for row in rows)
    with pytest.raises(UserError, match="tidar-vllm cannot represent engine=lean"):
        write("tidar-vllm", policy(replace(result, decision=chosen)), tmp_path / "out")


@pytest.fixture
def elsewhere(checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """Deployments that were not tuned for this model, here: the reason that is given, and the file."""
    model = load_model(str(checkpoint))
    here = device_of(model)
    good = Deployment(
        "tiny", model_hash(model), here, (Rule(DecodingConfig(), KernelConfig(threads=1)),), "now", "export"
    )
    changes: dict[str, dict[str, Any]] = {
        "tuned for tiny .* but the model is": {"model_hash": "0"},
        "tuned on device an abacus, but here it is": {"fingerprint": here | {"device": "an abacus"}},
        r"tuned on torch 0\.1, but here it is": {"fingerprint": here | {"torch": "0.1"}},
    }
    return {
        reason: save_deployment(replace(good, **change), tmp_path / f"{number}.yaml")
        for number, (reason, change) in enumerate(changes.items())
    } | {"": save_deployment(good, tmp_path / "good.yaml")}


def test_a_deployment_of_another_model_or_machine_is_refused_unless_told_otherwise(
    checkpoint: Path, elsewhere: dict[str, Any]
) -> None:
    model = load_model(str(checkpoint))
    for reason, path in elsewhere.items():
        for deployment in (path, load_deployment(path)):
            if reason:
                with pytest.raises(UserError, match=f"this deployment was {reason}.*--ignore-mismatch"):
                    generate(model, [[257, 1]], deployment, max_new_tokens=1)
                found = generate(model, [[257, 1]], deployment, max_new_tokens=1, ignore_mismatch=True)
            else:
                found = generate(model, [[257, 1]], deployment, max_new_tokens=1)
            assert found.decoding == DecodingConfig()
    # Memory and the kernel's patch level decide no times; one written by hand was tuned nowhere.
    good = load_deployment(elsewhere[""])
    for facts in (good.fingerprint | {"memory_bytes": 1, "system": "another"}, {}):
        generate(model, [[257, 1]], replace(good, fingerprint=facts), max_new_tokens=1)


def test_the_command_refuses_it_too(
    checkpoint: Path, elsewhere: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(p for reason, p in elsewhere.items() if "torch" in reason)
    words = [
        "generate",
        "--model",
        str(checkpoint),
        "--prompt",
        "a",
        "--max-new-tokens",
        "1",
        "--deployment",
        str(path),
    ]
    assert ridgepoint.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "tuned on torch 0.1" in said and "--ignore-mismatch" in said
    assert ridgepoint.main([*words, "--ignore-mismatch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decoding"]["sampler"] == "autoregressive"


def test_the_device_of_a_model_is_what_it_runs_on(checkpoint: Path) -> None:
    found = device_of(load_model(str(checkpoint)))
    assert found["device"] == found["cpu"] == fingerprint()["cpu"] and found["torch"] == torch.__version__
