"""Models of every family from their config.json: counts against transformers' modules, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ridgepoint
from hardware.files import UserError
from perfmodel.families import FAMILIES
from perfmodel.model_names import built_in_names, model_for
from perfmodel.model_spec import ModelSpec, known_models, load_spec

BUILT_IN = Path(__file__).parents[1] / "perfmodel" / "models"
# Totals as published, in billions: by the papers' tables or the repositories' counters of tensor sizes.
PUBLISHED_BILLIONS = {
    "dream-7b": 7.62, "gemma-3-12b": 11.77, "gemma-3-27b": 27.01,
    "gpt-oss-120b": 116.83, "gpt-oss-20b": 20.91, "llada-8b": 8.02, "llada2.0-flash": 102.89,
    "llada2.0-mini": 16.26, "llama-2-13b": 13.02, "llama-2-70b": 68.98, "llama-2-7b": 6.74, "llama-3.1-405b": 405.85,
    "llama-3.1-70b": 70.55, "llama-3.1-8b": 8.03, "llama-3.2-1b": 1.236, "llama-3.2-3b": 3.21, "mistral-7b-v0.3": 7.25,
    "mixtral-8x22b": 140.62, "mixtral-8x7b": 46.70, "qwen2.5-32b": 32.76, "qwen2.5-72b": 72.71, "qwen2.5-7b": 7.62,
    "qwen3-14b": 14.77, "qwen3-235b-a22b": 235.09, "qwen3-30b-a3b": 30.53, "qwen3-32b": 32.76, "qwen3-4b": 4.02,
    "qwen3-8b": 8.19, "qwen3-coder-480b-a35b": 480.15, "sdar-30b-a3b": 30.53, "sdar-8b": 8.19,
    "zaya1-74b-preview": 74.79, "zaya1-8b": 8.84,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "intermediate_size": 160},
    "mistral": {"sliding_window": 20, "intermediate_size": 160, "head_dim": 16},
    "qwen2": {
        "intermediate_size": 96, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"intermediate_size": 96, "head_dim": 24, "attention_bias": True},
    "qwen3_moe": {
        "intermediate_size": 96, "head_dim": 24, "moe_intermediate_size": 40, "num_experts": 6,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2, "mlp_only_layers": [1],
    },
    "mixtral": {"intermediate_size": 72, "num_local_experts": 5, "num_experts_per_tok": 2},
    "gemma3_text": {"intermediate_size": 72, "head_dim": 20, "sliding_window": 9, "hidden_act": None},
    "gpt_oss": {"intermediate_size": 72, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16,
                "sliding_window": 9},
}  # fmt: skip


def small(kind: str, **changes: Any) -> dict[str, Any]:
    """A small config.json of a family."""
    shared = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
              "vocab_size": 300, "max_position_embeddings": 512, "hidden_act": "silu"}  # fmt: skip
    return {"model_type": kind, **shared, **SMALL[kind], **changes}


def spec_of(config: dict[str, Any], folder: Path, name: str = "config.json") -> ModelSpec:
    path = folder / name
    path.write_text(json.dumps(config))
    return load_spec(path)


def live_module(config: dict[str, Any]) -> Any:
    """transformers' module of these keys, without memory for its weights."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    keys = {k: v for k, v in config.items() if k not in {"model_type", "quantization_config"} and not k.startswith("_")}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**keys))


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_counts_equal_the_live_module(kind: str, tmp_path: Path) -> None:
    """Parameters, and the widths of what each layer caches."""
    spec = spec_of(small(kind), tmp_path)
    module = live_module(small(kind))
    assert spec.parameters == sum(p.numel() for p in module.parameters())
    cached = sum(
        layer.self_attn.k_proj.out_features + layer.self_attn.v_proj.out_features for layer in module.model.layers
    )
    assert spec.stored_kv_bytes_per_token("bfloat16") == 2 * cached
    assert spec.stored_kv_bytes_per_token("fp8") == cached
    assert spec.state_bytes_per_sequence("bfloat16") == 0


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_what_transformers_writes_can_be_read(kind: str, tmp_path: Path) -> None:
    """Every key that the library saves is known, and says the same as the config it was made from."""
    module = live_module(small(kind))
    (tmp_path / "saved").mkdir()
    module.config.save_pretrained(tmp_path / "saved")
    saved, made = load_spec(tmp_path / "saved"), spec_of(small(kind), tmp_path)
    assert vars(saved) == {**vars(made), "name": "saved"}


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-30b-a3b", "gpt-oss-20b"])
def test_full_sized_models_equal_the_live_module(name: str) -> None:
    module = live_module(json.loads((BUILT_IN / f"{name}.json").read_text()))
    assert load_spec(name).parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", sorted(p.stem for p in BUILT_IN.glob("*.json")))
def test_built_in_models_have_their_published_size(name: str) -> None:
    spec = load_spec(name)
    assert spec.parameters / 1e9 == pytest.approx(PUBLISHED_BILLIONS[name], rel=1e-3)
    assert sum(spec.parameters_by_component().values()) == spec.parameters
    assert name in known_models()


@given(st.sampled_from(sorted(set(PUBLISHED_BILLIONS))), st.sampled_from(["bfloat16", "fp8", "float32"]))
def test_laws_of_sizes(name: str, dtype: str) -> None:
    spec = load_spec(name)
    query_heads, kv_heads = spec.heads
    assert query_heads % kv_heads == 0 and query_heads * spec.head_dim == spec.query_size
    assert spec.moe_layers + spec.dense_layers == spec.layers
    assert (spec.num_experts == 0) == (spec.moe_layers == 0)
    assert spec.stored_kv_bytes_per_token(dtype) <= 4 * spec.layers * 2 * spec.query_size
    active = spec.parameters - spec.moe_layers * (spec.num_experts - spec.experts_per_token) * spec.expert_parameters
    assert (active < spec.parameters) == (spec.num_experts > 0)


def test_windows_follow_the_family(tmp_path: Path) -> None:
    assert spec_of(small("mistral"), tmp_path).window_by_layer == (20,) * 4
    assert spec_of(small("qwen2"), tmp_path).window_by_layer == (None, 7, 7, 7)
    assert spec_of(small("qwen2", use_sliding_window=False), tmp_path).window_by_layer == (None,) * 4
    assert spec_of(small("gpt_oss"), tmp_path).window_by_layer == (9, None, 9, None)
    assert load_spec("gpt-oss-120b").window_by_layer.count(128) == 18
    assert load_spec("zaya1-74b-preview").window_by_layer.count(4097) == 30
    kinds = ["full_attention", "full_attention", "full_attention", "sliding_attention"]
    assert spec_of(small("gpt_oss", layer_types=kinds), tmp_path).window_by_layer == (None, None, None, 9)


def test_dense_layers_of_a_mixture(tmp_path: Path) -> None:
    """Of four layers, 0 and 2 miss the step of 2, and 1 is listed."""
    spec = spec_of(small("qwen3_moe"), tmp_path)
    assert (spec.dense_layers, spec.moe_layers, spec.mlp_size) == (3, 1, 96)
    assert load_spec("llada2.0-mini").dense_layers == 1
    assert load_spec("llada2.0-mini").shared_expert_size == 512
    assert load_spec("mixtral-8x7b").dense_layers == 0


def test_quantised_checkpoints(tmp_path: Path) -> None:
    assert str(load_spec("gpt-oss-20b").published_precision) == "bfloat16, mxfp4 experts"
    fp8 = spec_of(small("qwen3", quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}), tmp_path)
    assert fp8.published_precision.weights == "fp8" and fp8.published_precision.head == "bfloat16"
    with pytest.raises(UserError, match=r"quant_method 'awq'; known: fp8, mxfp4"):
        spec_of(small("qwen3", quantization_config={"quant_method": "awq"}), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "unknown model_type .*'mamba'; known: .*qwen3_moe.*zaya"),
        ({"model_type": None}, "unknown model_type"),
        ({"model_type": ["llama"]}, "unknown model_type"),
        ({"model_type": {}}, "unknown model_type"),
        ({"architectures": 5}, "architectures must be a list of names, but is 5"),
        ({"architectures": [5]}, "architectures must be a list of names"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names, but is 'LlamaForCausalLM'"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers <= 10000 must hold, but is 1000000000000"),
        ({"vocab_size": 10**400}, "vocab_size <= 1000000000 must hold"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "unknown architecture .*; known: LlamaForCausalLM"),
        ({"num_experts": 8}, "unknown key 'num_experts'"),
        ({"n_routed_experts": 8}, "unknown key 'n_routed_experts'"),
        ({"sliding_window": 128}, "unknown key 'sliding_window'"),
        ({"anything_new": 1}, "unknown key 'anything_new'"),
        ({"hidden_size": None}, "missing key 'hidden_size'"),
        ({"vocab_size": 0}, "vocab_size must be a whole number >= 1, but is 0"),
        ({"vocab_size": "300"}, "vocab_size must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"head_dim": None, "num_attention_heads": 10}, "hidden_size must be a multiple"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' .* but is 'gelu'"),
        ({"mlp_bias": 1}, "mlp_bias must be true or false"),
    ],
)
def test_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(small("llama", **change), tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok <= 5"),
        ("qwen3_moe", {"num_experts": None}, "missing key 'num_experts'"),
        ("qwen3_moe", {"mlp_only_layers": 5}, "mlp_only_layers must be a list of layer numbers, but is 5"),
        ("qwen3_moe", {"mlp_only_layers": ["a"]}, "mlp_only_layers must be a list of layer numbers"),
        ("qwen3_moe", {"mlp_only_layers": {"a": 1}}, "mlp_only_layers must be a list of layer numbers"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers must be a list of layer numbers"),
        ("qwen3_moe", {"num_local_experts": 7}, "must be equal"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "unknown key 'shared_expert_intermediate_size'"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "one entry for each of 4 layers"),
        ("gpt_oss", {"layer_types": ["linear_attention"] * 4}, "full_attention or sliding_attention"),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4}, "must not hold"),
    ],
)
def test_refused_of_other_families(kind: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(small(kind, **change), tmp_path)


@pytest.mark.parametrize("text", ['{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}", "[" * 100_000])
def test_a_config_that_no_parser_takes_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.json") as error:
        load_spec(path)
    assert "\n" not in str(error.value)


def test_a_zaya_of_a_trillion_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_hidden_layers <= 10000 must hold, but got 1000000000000"):
        spec_of({"model_type": "zaya", "num_hidden_layers": 10**12}, tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model", "\0"], ids=["long", "home", "null"])
def test_what_cannot_be_a_path_is_an_unknown_model(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown model .*; known: .*llama"):
        load_spec(name)


def test_other_blocks_of_llada_are_refused(tmp_path: Path) -> None:
    published = json.loads((BUILT_IN / "llada-8b.json").read_text())
    with pytest.raises(UserError, match="block_type must be 'llama'"):
        spec_of(published | {"block_type": "sequential"}, tmp_path)
    with pytest.raises(UserError, match="unknown key 'num_experts'"):
        spec_of(published | {"num_experts": 64}, tmp_path)


def test_broken_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small("llama"))[:-20])
    with pytest.raises(UserError, match="not valid JSON") as error:
        load_spec(tmp_path)
    assert "\n" not in str(error.value)


def test_every_family_is_built_in_or_small() -> None:
    """No reader without a config that exercises it."""
    kinds = {json.loads(p.read_text())["model_type"] for p in BUILT_IN.glob("*.json")}
    assert set(FAMILIES) <= kinds | set(SMALL)


def test_published_names() -> None:
    files = {p.stem for p in BUILT_IN.glob("*.json")}
    assert built_in_names() == files == set(PUBLISHED_BILLIONS)
    for name in files:
        assert model_for(name) == name and model_for(name.upper()) == name
    assert model_for("Llama-3.3-70B") == "llama-3.1-70b"
    assert model_for("meta-llama/Llama-3.1-8B-Instruct-FP8") == "llama-3.1-8b"
    assert model_for("Qwen3-Coder-30B-A3B-Instruct") == "qwen3-30b-a3b"
    for other in ("Qwen3-Next-80B-A3B-Instruct", "Llama-3.1-8B EAGLE-3", "DeepSeek-V3", "someone/Qwen3-8B", ""):
        assert model_for(other) is None


def test_a_new_model_is_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One config.json works with the command, under its own name."""
    (tmp_path / "mine.json").write_text(json.dumps(small("qwen3_moe")))
    ridgepoint.main(
        ["predict", "--model", str(tmp_path / "mine.json"), "--hardware", "h100-sxm", "--context", "100", "--json"]
    )
    assert json.loads(capsys.readouterr().out)["model"] == "mine"
