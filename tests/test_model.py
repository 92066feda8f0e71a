"""The model against `transformers`' ZayaForCausalLM, and its laws: layouts, expert modes, dtypes, published names."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ZayaConfig, ZayaForCausalLM
from transformers.utils import logging

from runtime.checkpoint import load_model, random_model, save_model
from runtime.config import DecodingConfig, ExpertMode, KernelConfig, ModelConfig, model_config_from_json
from runtime.engine import generate
from runtime.layout import causal, draft
from runtime.model.moe import Experts
from runtime.model.zaya import Zaya
from tests.models import SMALL, TINY, VARIANTS, add_noise, config_of, noisy_model, random_ids, relative_error

TOLERANCE = 1e-4  # of the largest logit, in fp32
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def reference_config(variant: dict[str, Any]) -> ZayaConfig:
    keys = json.loads(json.dumps(SMALL | variant))  # the reference writes into the mappings it is given
    return ZayaConfig(**keys, attn_implementation="eager")


@cache
def pair(name: str) -> tuple[ZayaForCausalLM, Zaya]:
    """The reference and ours with the same noisy weights."""
    reference = ZayaForCausalLM(reference_config(VARIANTS[name])).eval()
    add_noise(reference)
    ours = random_model(config_of(VARIANTS[name]))
    ours.load_state_dict(reference.state_dict())  # strict: the names are the same
    return reference, ours.freeze()


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> ZayaForCausalLM:
    """`from_pretrained`, repaired: transformers 5.17 sets the skip expert's bias to -1 after reading the file.

    (`ZayaPreTrainedModel._init_weights` assigns `balancing_biases[-1]` without asking whether it was loaded.)
    """
    loaded, info = ZayaForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    stored, state = load_file(folder / "model.safetensors"), loaded.state_dict()
    assert set(state) - set(stored) <= {"lm_head.weight"}
    for name, tensor in stored.items():
        if name.endswith("balancing_biases"):
            state[name][-1] = tensor[-1]
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name
    return loaded.eval()


def chunks(model: Zaya, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of a prompt fed to a cache in pieces."""
    cache = model.new_cache(ids.shape[0], ids.shape[1], max(sizes))
    outputs, begin = [], 0
    for size in sizes:
        hidden = model.forward(ids[:, begin : begin + size], causal(size), cache)
        cache.advance([size] * ids.shape[0])
        outputs.append(model.project(hidden))
        begin += size
    assert begin == ids.shape[1]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", VARIANTS)
class TestAgainstReference:
    def test_whole_sequence(self, name: str) -> None:
        reference, ours = pair(name)
        ids = random_ids(3, 37, SMALL["vocab_size"])
        assert relative_error(ours.logits(ids), reference(ids).logits) <= TOLERANCE

    def test_cache_in_chunks_of_any_size(self, name: str) -> None:
        reference, ours = pair(name)
        ids = random_ids(2, 90, SMALL["vocab_size"], seed=1)
        expected = reference(ids).logits
        for sizes in ([1] * 20 + [70], [5, 1, 1, 17, 66], [90], [80, 3, 7]):
            assert relative_error(chunks(ours, ids, sizes), expected) <= TOLERANCE, sizes

    def test_reference_with_its_own_cache(self, name: str) -> None:
        reference, ours = pair(name)
        ids = random_ids(2, 24, SMALL["vocab_size"], seed=2)
        first = reference(ids[:, :19], use_cache=True)
        outputs, past = [first.logits], first.past_key_values
        for t in range(19, 24):
            step = reference(ids[:, t : t + 1], past_key_values=past, use_cache=True)
            outputs.append(step.logits)
            past = step.past_key_values
        assert relative_error(chunks(ours, ids, [19, 1, 1, 1, 1, 1]), torch.cat(outputs, dim=1)) <= TOLERANCE

    def test_ragged_prefill_then_steps(self, name: str) -> None:
        reference, ours = pair(name)
        ids, counts = random_ids(4, 40, SMALL["vocab_size"], seed=3), [5, 23, 1, 0]
        expected = reference(ids).logits
        cache = ours.new_cache(4, 64, 6)
        ours.forward(ids[:, :23], causal(23), cache, counts=counts)
        cache.advance(counts)
        for width in (6, 1, 4):
            rows = torch.stack([ids[b, n : n + width] for b, n in enumerate(cache.lengths)])
            found = ours.project(ours.forward(rows, causal(width), cache))
            wanted = torch.stack([expected[b, n : n + width] for b, n in enumerate(cache.lengths)])
            assert relative_error(found, wanted, expected) <= TOLERANCE
            cache.advance([width] * 4)

    def test_padding_on_the_right(self, name: str) -> None:
        reference, ours = pair(name)
        ids, mask = random_ids(3, 21, SMALL["vocab_size"], seed=4), torch.ones(3, 21, dtype=torch.int64)
        mask[0, 13:] = 0
        mask[2, 1:] = 0
        expected = reference(ids, attention_mask=mask).logits
        assert relative_error(ours.logits(ids, mask)[mask == 1], expected[mask == 1]) <= TOLERANCE

    def test_padding_on_the_left(self, name: str) -> None:
        reference, ours = pair(name)
        ids, mask = random_ids(3, 21, SMALL["vocab_size"], seed=5), torch.ones(3, 21, dtype=torch.int64)
        mask[0, :8] = 0
        mask[2, :20] = 0
        found = ours.logits(ids, mask)
        if ours.config.attention_bias:
            # The reference's padding rows project to the bias here, and its convolutions read them, so its padded
            # and unpadded logits differ (by 0.3% of the scale). Ours do not: compare with the unpadded reference.
            for row, first in enumerate((8, 0, 20)):
                expected = reference(ids[row : row + 1, first:]).logits[0]
                assert relative_error(found[row, first:], expected) <= TOLERANCE
            return
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        expected = reference(ids, attention_mask=mask, position_ids=positions).logits
        assert relative_error(found[mask == 1], expected[mask == 1]) <= TOLERANCE

    def test_weights_saved_by_the_reference_load_here(self, name: str, tmp_path: Path) -> None:
        reference, ours = pair(name)
        ids = random_ids(2, 15, SMALL["vocab_size"], seed=6)
        for shard in ("1GB", "60KB"):
            reference.save_pretrained(tmp_path / shard, max_shard_size=shard)
            loaded = load_model(str(tmp_path / shard), engine="eager")
            assert loaded.config == ours.config
            assert torch.equal(loaded.logits(ids), ours.logits(ids))
        assert (tmp_path / "1GB" / "model.safetensors").is_file()
        assert len(list((tmp_path / "60KB").glob("model-*-of-*.safetensors"))) > 3

    def test_weights_saved_here_load_in_the_reference(self, name: str, tmp_path: Path) -> None:
        _, ours = pair(name)
        ids = random_ids(2, 15, SMALL["vocab_size"], seed=6)
        save_model(ours, tmp_path)
        assert relative_error(ours.logits(ids), load_reference(tmp_path)(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("name", ["shrunk", "biases-untied"])
def test_bfloat16_files_hold_the_same_weights_for_both(name: str, tmp_path: Path) -> None:
    """Balancing biases stay fp32, as published: rounding them would route tokens elsewhere."""
    reference, ours = pair(name)
    ids = random_ids(2, 25, SMALL["vocab_size"], seed=7)
    save_model(ours, tmp_path / "ours", dtype="bfloat16")
    assert (tmp_path / "ours" / "model.safetensors").stat().st_size < 0.6 * sum(
        p.numel() * 4 for p in ours.parameters()
    )
    loaded = load_model(str(tmp_path / "ours"))
    assert loaded.model.embed_tokens.weight.dtype == torch.float32
    assert relative_error(loaded.logits(ids), load_reference(tmp_path / "ours")(ids).logits) <= TOLERANCE
    assert relative_error(loaded.logits(ids), ours.logits(ids)) > TOLERANCE  # the weights were rounded
    for mine, its in zip(loaded.model.layers, reference.model.layers, strict=True):
        assert torch.equal(mine.mlp.gate.balancing_biases, its.mlp.gate.balancing_biases)


def test_computing_in_bfloat16_is_as_good_as_the_reference(tmp_path: Path) -> None:
    _, ours = pair("shrunk")
    save_model(ours, tmp_path, dtype="bfloat16")
    ids = random_ids(8, 40, SMALL["vocab_size"], seed=8)
    exact = load_model(str(tmp_path)).logits(ids)
    found = load_model(str(tmp_path), dtype="bfloat16").logits(ids)
    theirs = load_reference(tmp_path, torch.bfloat16)(ids).logits.float()
    assert found.dtype == torch.float32
    # Medians, because a token that rounding sends to another expert differs by much in either.
    assert (found - exact).abs().median() <= 1.5 * (theirs - exact).abs().median()


def test_greedy_generation_gives_the_references_tokens() -> None:
    reference, ours = pair("sliding")
    prompts = random_ids(3, 9, SMALL["vocab_size"], seed=9)
    limits: dict[str, Any] = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    expected = reference.generate(prompts, attention_mask=torch.ones_like(prompts), **limits)[:, 9:]
    found = generate(ours, prompts.tolist(), DecodingConfig(), max_new_tokens=30, stop_tokens=())
    assert found.tokens == expected.tolist()


def test_full_size_names_shapes_and_parameter_count() -> None:
    with torch.device("meta"):
        ours, reference = Zaya(ModelConfig()), ZayaForCausalLM(ZayaConfig())
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 8_840_488_784
    assert sum(p.numel() for p in reference.parameters()) == 8_840_488_784


def test_published_config_reads_as_the_defaults(tmp_path: Path) -> None:
    """Zyphra/ZAYA1-8B's config.json, with its stray keys: rope_type beside the layer types, partial_rotary_factor."""
    published = ZayaConfig().to_dict() | {
        "architectures": ["ZayaForCausalLM"],
        "dtype": "bfloat16",
        "partial_rotary_factor": 0.5,
    }
    published["rope_parameters"]["rope_type"] = "default"
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert model_config_from_json(tmp_path / "config.json") == ModelConfig()


def test_absent_rotary_factor_means_the_whole_head_as_in_the_reference(tmp_path: Path) -> None:
    rope = {"hybrid": {"rope_theta": 300.0, "rope_type": "default"}}
    reference = ZayaForCausalLM(reference_config({"rope_parameters": rope})).eval()
    add_noise(reference)
    reference.save_pretrained(tmp_path)
    ids = random_ids(2, 20, SMALL["vocab_size"])
    assert relative_error(load_model(str(tmp_path)).logits(ids), reference(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("skips", ["some", "all", "none"])
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_expert_modes_agree(tokens: int, skips: str) -> None:
    model = noisy_model(seed=4)
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[-1] = {"some": 0.2, "all": 9.0, "none": -9.0}[skips]
    model.freeze()
    ids = random_ids(1, tokens, TINY.vocab_size)
    modes: tuple[ExpertMode, ...] = ("loop", "grouped", "gather", "dense")
    found = {}
    for mode in modes:
        model.kernels = KernelConfig(experts={1_000_000: mode})
        routes: list[Tensor] = []
        found[mode] = model.project(model.forward(ids, causal(tokens), routes=routes))
        skipped = float((torch.stack(routes) == TINY.num_experts).double().mean())
        assert skipped == 1 if skips == "all" else skipped == 0 if skips == "none" else tokens < 40 or 0 < skipped < 1
    for mode in modes:
        assert relative_error(found[mode], found["loop"]) < 1e-5, mode


def test_kernel_settings_choose_the_mode_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy_model()
    model.kernels = KernelConfig(experts={1: "gather", 8: "dense", 20: "loop"})
    used: list[str] = []
    for mode in ("gather", "dense", "loop"):
        run = getattr(Experts, f"_{mode}")
        monkeypatch.setattr(Experts, f"_{mode}", lambda *a, m=mode, run=run: used.append(m) or run(*a))
    for tokens in (1, 2, 8, 9, 20, 21):
        model.logits(random_ids(1, tokens, TINY.vocab_size))
    assert used[:: TINY.num_hidden_layers] == ["gather", "dense", "dense", "loop", "loop", "loop"]


def test_derived_weights_follow_training() -> None:
    model = noisy_model()
    ids = random_ids(2, 9, TINY.vocab_size)
    before = model.logits(ids)
    model.train()
    for parameter in model.parameters():
        parameter.mul_(1.1)
    unfrozen = model.logits(ids)
    assert relative_error(unfrozen, before) > 1e-3
    assert relative_error(model.freeze().logits(ids), unfrozen) < 1e-5


def test_one_batch_row_does_not_see_another() -> None:
    model = noisy_model()
    ids = random_ids(3, 12, TINY.vocab_size)
    alone = torch.cat([model.logits(ids[b : b + 1]) for b in range(3)])
    assert relative_error(model.logits(ids), alone) < 1e-5


def test_causal_logits_do_not_see_the_future() -> None:
    model = noisy_model()
    ids = random_ids(1, 12, TINY.vocab_size)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % TINY.vocab_size
    first, second = model.logits(ids)[0], model.logits(changed)[0]
    assert relative_error(first[:7], second[:7]) < 1e-6
    assert (first[7:] - second[7:]).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("lengths", [[9, 9], [9, 4]], ids=["equal lengths", "ragged"])
@pytest.mark.parametrize("name", ["shrunk", "sliding", "long-convolutions"])
def test_draft_sees_prefix_anchor_and_masks_and_its_anchor_row_is_causal(name: str, lengths: list[int]) -> None:
    _, model = pair(name)
    ids, masks = random_ids(2, 20, SMALL["vocab_size"], seed=11), 4
    cache = model.new_cache(2, 40, 5)
    model.forward(ids[:, :9], causal(9), cache, counts=lengths)
    cache.advance(lengths)
    anchors = torch.stack([ids[b, n : n + 1] for b, n in enumerate(lengths)])

    def run(mask_tokens: list[int]) -> Tensor:
        return model.project(
            model.forward(torch.cat([anchors, torch.tensor([mask_tokens] * 2)], 1), draft(masks), cache)
        )

    found = run([7] * 4)
    for b, n in enumerate(lengths):
        expected = model.logits(ids[b : b + 1, : n + 1])[0, -1]
        assert relative_error(found[b, 0], expected) < 1e-5
        alone = model.new_cache(1, 40, 5)
        model.forward(ids[b : b + 1, :n], causal(n), alone)
        alone.advance([n])
        single = model.forward(torch.cat([anchors[b], torch.full((masks,), 7)])[None], draft(masks), alone)
        assert relative_error(found[b], model.project(single)[0]) < 1e-5  # whatever the neighbours' lengths
    changed = run([7, 7, 7, 8])
    assert relative_error(changed[:, 0], found[:, 0]) < 1e-6  # the anchor does not see the masks
    assert (changed[:, 1:] - found[:, 1:]).abs().amax(-1).min() > 1e-3  # every mask sees the last one
