"""Checkpoints: what is written is what is read, and every damaged or impossible one is refused in one clear line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hardware.files import UserError
from runtime import checkpoint
from runtime.checkpoint import INDEX, WEIGHTS, empty_model, load_model, model_hash, random_model, save_model
from runtime.config import ModelConfig, model_config_from_json, replace
from runtime.model.zaya import Zaya
from tests.interpreter import interpreted
from tests.models import SMALL, TINY, VARIANTS, config_of, noisy_model

torch.set_num_threads(1)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> Zaya:
    return noisy_model()


@pytest.fixture
def folder(model: Zaya, tmp_path: Path) -> Path:
    save_model(model, tmp_path)
    return tmp_path


def refused(folder: Path | str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


def edit(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def shard(folder: Path) -> dict[str, str]:
    """Split the weights over two shards; returns the weight map."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / WEIGHTS).unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Round trips


@pytest.mark.parametrize(
    "config",
    [*map(config_of, VARIANTS.values()), TINY, replace(TINY, eos_token_id=[3, 4], pad_token_id=7)],
    ids=[*VARIANTS, "no ids", "two ends"],
)
def test_configuration_weights_and_hash_come_back(config: ModelConfig, tmp_path: Path) -> None:
    saved = noisy_model(config, seed=5)
    save_model(saved, tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.config == config
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert model_hash(loaded) == model_hash(saved)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


def test_half_precision_keeps_routing_in_fp32(model: Zaya, tmp_path: Path) -> None:
    save_model(model, tmp_path, dtype="bfloat16")
    loaded = load_model(str(tmp_path), dtype="bfloat16")
    for mine, other in zip(loaded.model.layers, model.model.layers, strict=True):
        assert torch.equal(mine.mlp.gate.balancing_biases, other.mlp.gate.balancing_biases)
        assert torch.equal(mine.mlp.experts.down_proj, other.mlp.experts.down_proj.bfloat16())
    assert model_hash(load_model(str(tmp_path))) == model_hash(loaded)  # of the stored weights, not of the type


def test_tied_head_is_stored_once_and_stays_tied(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    loaded = load_model(str(folder))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_shards_with_an_index_load(folder: Path, model: Zaya) -> None:
    shard(folder)
    assert model_hash(load_model(str(folder))) == model_hash(model)


def test_saving_over_a_checkpoint_replaces_it(folder: Path) -> None:
    save_model(noisy_model(seed=9), folder)
    assert model_hash(load_model(str(folder))) == model_hash(noisy_model(seed=9))


def test_hash_tells_weights_and_configurations_apart(model: Zaya) -> None:
    changed = noisy_model()
    changed.model.layers[1].mlp.gate.balancing_biases[2] += 0.01
    renamed = noisy_model(replace(TINY, eos_token_id=5))
    assert len({model_hash(m) for m in (model, changed, renamed, noisy_model(seed=1))}) == 4
    assert model_hash(noisy_model()) == model_hash(model)


def test_random_models_repeat_by_seed_and_leave_nothing_degenerate() -> None:
    first, again, other = random_model(TINY), random_model(TINY), random_model(TINY, seed=1)
    assert model_hash(first) == model_hash(again) != model_hash(other)
    assert all(bool(p.isfinite().all()) for p in first.parameters())
    assert all(bool((layer.self_attn.qk_norm.temp != 0).all()) for layer in first.model.layers)
    logits = first.freeze().logits(torch.arange(20)[None])
    assert 0.05 < float(logits.std()) < 5


# Damaged files


def test_every_truncation_is_refused(model: Zaya, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("truncated")
    save_model(model, folder)
    whole = (folder / WEIGHTS).read_bytes()

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, len(whole) - 1))
    def check(size: int) -> None:
        (folder / WEIGHTS).write_bytes(whole[:size])
        refused(folder, r"cannot read .*model\.safetensors \(truncated or not safetensors\)")

    for size in (0, 7, 8, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:size])
        refused(folder, "truncated or not safetensors")
    check()


@pytest.mark.parametrize("content", [b"not a checkpoint", b"\xff" * 64, b"\x00" * 64, b"PK\x03\x04" + b"\x00" * 60])
def test_other_files_are_refused(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "truncated or not safetensors")


def _drop(tensors: Tensors) -> None:
    del tensors["model.layers.1.self_attn.qk_norm.temp"]
    del tensors["model.norm.weight"]


def _reshape(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.zeros(TINY.hidden_size + 1)


def _transpose(tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def _add(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.gate.balancing_biases"] = torch.zeros(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"2 tensors are missing, for example 'model\.layers\.1\.self_attn\.qk_norm\.temp'"),
        (_reshape, r"model\.norm\.weight must have shape \(24,\), but has \(25,\)"),
        (_transpose, r"o_proj\.weight must have shape \(24, 32\), but has \(32, 24\)"),
        (_add, r"unexpected tensor 'model\.layers\.2\.mlp\.gate\.balancing_biases'"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[Tensors], None], message: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    refused(folder, message)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "sub/a.safetensors", ".."])
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: str) -> None:
    weight_map = shard(folder)
    outside = folder.parent / "outside.safetensors"
    save_file({"model.norm.weight": torch.zeros(TINY.hidden_size)}, outside)
    write_index(folder, weight_map | {"model.norm.weight": name})
    refused(folder, "must lie in the checkpoint's folder|which its index names")


@pytest.mark.parametrize("weight_map", [None, [], "a.safetensors", 3])
def test_an_index_without_a_map_is_refused(folder: Path, weight_map: Any) -> None:
    shard(folder)
    write_index(folder, weight_map)
    refused(folder, "weight_map must be a mapping")


def test_absent_and_cut_shards_are_named(folder: Path) -> None:
    shard(folder)
    content = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(content[:-5])
    refused(folder, r"b\.safetensors \(truncated")
    (folder / "b.safetensors").unlink()
    refused(folder, r"lacks b\.safetensors, which its index names")


def test_absent_files_are_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, f"holds neither {WEIGHTS} nor {INDEX}")
    (folder / "config.json").unlink()
    refused(folder, "holds no config.json, so it is no checkpoint")


def test_an_unknown_name_lists_the_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "bundled", lambda: {"zaya-small": folder, "zaya-nano": folder})
    refused("zaya-nona", "unknown model 'zaya-nona'; known: zaya-nano, zaya-small")
    assert load_model("zaya-small").config == TINY


def test_what_cannot_be_written_is_refused(model: Zaya, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write"):
            save_model(model, target)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(UserError, match="cannot hold the model on cuda"):
        load_model(str(folder), device=absent)
    with pytest.raises(UserError, match="cannot hold the model on abacus"):
        empty_model(TINY, device="abacus")


# Configurations


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads must be a multiple of num_key_value_heads, but got 4 and 3",
        ),
        ({"num_key_value_heads": 1, "head_dim": 7}, r"num_key_value_heads \* head_dim must be even.* but got 1 \* 7"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok must be 1, but got 2"),
        ({"hidden_sise": 64}, "unknown key 'hidden_sise'; known: .*hidden_size"),
        ({"hidden_size": 0}, "hidden_size >= 1 must hold, but got 0"),
        ({"hidden_size": "24"}, "hidden_size: must be a int, but is '24'"),
        ({"hidden_size": True}, "hidden_size: must be a int, but is True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', but is 'gelu'"),
        ({"model_type": "llama"}, "model_type must be 'zaya', but is 'llama'"),
        ({"layer_types": ["hybrid"]}, "layer_types must have num_hidden_layers = 2 entries, but has 1"),
        ({"layer_types": ["hybrid", "linear"]}, "must be one of hybrid, hybrid_sliding, but is 'linear'"),
        ({"layer_types": ["hybrid", "hybrid_sliding"]}, "sliding_window >= 1 must be set for hybrid_sliding layers"),
        ({"cca_time0": 1, "cca_time1": 1}, r"cca_time0 \+ cca_time1 >= 3 must hold .* but got 1 \+ 1"),
        ({"mask_token_id": 29}, "0 <= mask_token_id < vocab_size = 29 must hold, but got 29"),
        ({"rope_parameters": {"hybrid_sliding": {"rope_theta": 1e4}}}, "must have an entry for 'hybrid' layers"),
        ({"rope_parameters": {"hybrid": {"rope_theta": -1.0}}}, "rope_theta > 0 must hold, but got -1.0"),
        ({"rope_parameters": {"hybrid": {"rope_theta": 1e4, "rope_type": "yarn"}}}, "one of default, but is 'yarn'"),
        ({"rope_parameters": {"hybrid": {"rope_theta": 1e4, "factor": 4.0}}}, "unknown key 'factor'"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "rope_parameters.rope_theta: must be a"),
        (
            {"rope_parameters": {"hybrid": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}},
            "the rotated part of head_dim must be even, but got 3 of 8",
        ),
    ],
)
def test_impossible_configurations(folder: Path, keys: dict[str, Any], message: str) -> None:
    edit(folder, **keys)
    refused(folder, rf"config\.json.*{message}")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "zaya"', "\x00"])
def test_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json")


def test_absent_keys_are_the_published_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "zaya"}')
    assert model_config_from_json(tmp_path / "config.json") == ModelConfig()
    null = {"model_type": "zaya", "layer_types": None, "rope_parameters": None, "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(null | SMALL))
    assert model_config_from_json(tmp_path / "config.json") == config_of({})


def test_a_model_is_loaded_without_the_compilers_of_torch() -> None:
    """Drawing values for a meta tensor imports them, which takes longer than the rest."""
    assert interpreted(__name__, "imported_by_loading") == []


def imported_by_loading() -> list[str]:
    empty_model(TINY)
    return sorted({"torch._dynamo", "torch._inductor"} & set(sys.modules))
