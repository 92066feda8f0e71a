"""A trial with a real (tiny, random) model: every sampler goes through its stages, and the model is left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autotune.local import Plan, Work, mixed_problems, tune_local
from autotune.objective import Outputs, decoding_stages, run_stages
from autotune.runner import LocalRunner
from autotune.space import Candidate, Value, decoding_space
from autotune.storage import storage_url
from hardware.files import UserError
from hardware.profile import load_profile
from runtime.bench import identify
from runtime.checkpoint import save_model
from runtime.config import SAMPLER_NAMES, DecodingConfig, KernelConfig, Sampler
from runtime.model.zaya import Zaya
from tests.models import TINY, noisy_model

CONFIG = replace(TINY, vocab_size=264, pad_token_id=256, bos_token_id=257, eos_token_id=258, mask_token_id=259)
PROMPTS = [[257, 1, 2, 3], [257, 4]]


@pytest.fixture(scope="module")
def model() -> Zaya:
    return noisy_model(CONFIG)


def test_the_runner_leaves_the_model_as_it_was(model: Zaya) -> None:
    """... judges with the default kernels, and refuses what cannot run before running it."""
    before = (model.kernels.experts, torch.get_num_threads())
    runner = LocalRunner(model, identify(model, "tiny", ""), PROMPTS, batch=1, max_new_tokens=5, repeats=2)
    candidate = Candidate(DecodingConfig("two_forward", draft_tokens=3), KernelConfig({1_000_000: "dense"}, threads=1))
    assert runner.infeasible(candidate) is None
    record, outputs = runner.measure(candidate)
    assert runner.quality(outputs) == {"divergence": 0.0}
    assert runner.quality([[9] * 5] * 2)["divergence"] > 0.5
    assert len(record.seconds) == 2 and record.tokens == (10, 10) and record.workload.batch == 1
    assert record.decoding == candidate.decoding and record.kernels == candidate.kernels
    assert min(runner.pair(candidate, candidate)) > 0
    assert (model.kernels.experts, torch.get_num_threads()) == before
    long = LocalRunner(model, identify(model, "tiny", ""), PROMPTS, batch=1, max_new_tokens=1000)
    assert "positions" in (long.infeasible(candidate) or "")
    single = noisy_model(replace(CONFIG, mask_token_id=None))
    unmasked = LocalRunner(single, identify(single, "tiny", ""), PROMPTS, batch=1, max_new_tokens=5)
    assert "mask_token_id" in (unmasked.infeasible(candidate) or "")
    with pytest.raises(UserError, match="fill batches of 3"):
        LocalRunner(model, identify(model, "tiny", ""), PROMPTS, batch=3, max_new_tokens=5)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_sampler_goes_through_a_trial(sampler: Sampler, model: Zaya) -> None:
    """Lossless settings have no divergence, and one that claims to be lossless and is not is found out."""

    class Wrong(LocalRunner):
        def quality(self, outputs: Outputs) -> dict[str, float]:
            return {"divergence": 0.5}

    facts = identify(model, "tiny", "")
    runner = LocalRunner(model, facts, PROMPTS, batch=2, max_new_tokens=9, repeats=1)
    wrong = Wrong(model, facts, PROMPTS, batch=2, max_new_tokens=9, repeats=1)
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
    tried = [c for c in decoding_space(batch=2, cores=1).grid(coarse) if c.decoding.sampler == sampler]
    assert tried
    for candidate in tried:
        kept: dict[str, dict[str, object]] = {}
        found = run_stages(decoding_stages(candidate, runner, 0.0, 0.0), kept.__setitem__)
        assert found["outcome"] == "correct", found
        assert {"decode", "quality", "result"} <= set(kept) and found["tokens_per_second"] > 0
        assert (found["divergence"] == 0) == candidate.decoding.lossless  # a random model's drafts are never right
        outcome = run_stages(decoding_stages(candidate, wrong, 0.0, 0.0), lambda *_: None)["outcome"]
        assert outcome == ("incorrect" if candidate.decoding.lossless else "correct")


def test_a_gpu_profile_does_not_predict_this_machine(model: Zaya, tmp_path: Path) -> None:
    save_model(model, tmp_path / "tiny")
    with pytest.raises(UserError, match="cpu is a cpu, but h100-sxm"):
        tune_local(Work(str(tmp_path / "tiny")), storage_url(tmp_path), load_profile("h100-sxm"), Plan())


def test_problems_are_mixed_and_always_the_same() -> None:
    found = mixed_problems(25)
    assert found == mixed_problems(25) and found[:7] == mixed_problems(7)
    families = [p.family for p in found]
    assert len(set(families[:10])) == 10 and len({p.prompt for p in found}) == 25
