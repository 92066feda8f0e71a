"""Reading a `config.json` of the known families of decoders as a ModelSpec. One entry of FAMILIES per model_type.

Reading is strict: a key that no reader uses and that is not known to leave the cost alone is an error, so that a
mixture of experts, a second window or a wider layer is never silently left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardware.files import UserError, known, read_json
from perfmodel.model_spec import ModelSpec, spec_from_config
from runtime.config import model_config_from_json, require

# Keys that change neither how much a forward computes nor what it reads.
_HARMLESS = frozenset(
    "architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id id2label "
    "initializer_range is_encoder_decoder label2id mask_token_id model_type output_attentions output_hidden_states "
    "output_router_logits pad_token_id partial_rotary_factor pretraining_tp problem_type return_dict rms_norm_eps "
    "rope_parameters rope_scaling rope_theta router_aux_loss_coef torch_dtype transformers_version use_cache "
    "_name_or_path".split()
)


class Keys:
    """A config's keys, each marked as used when it is read. `where` names the file in messages."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where
        self.used: set[str] = set()

    def get(self, name: str) -> Any:
        """The value, or None where the key is absent or null."""
        self.used.add(name)
        return self.data.get(name)

    def count(self, name: str, default: int | None = None, least: int = 1, most: int = 10**9) -> int:
        """A whole number from least to most; an absent or null key is `default`, or an error where there is none."""
        value = self.get(name)
        value = default if value is None else value
        require(value is not None, f"{self.where}: missing key {name!r}")
        require(
            isinstance(value, int) and not isinstance(value, bool) and value >= least,
            f"{self.where}: {name} must be a whole number >= {least}, but is {value!r}",
        )
        assert isinstance(value, int)  # as was just required
        require(value <= most, f"{self.where}: {name} <= {most} must hold, but is {value}")
        return value

    def layers(self, name: str) -> int:
        """The number of layers, few enough to list them."""
        return self.count(name, most=10_000)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(name)
        value = default if value is None else value
        require(isinstance(value, bool), f"{self.where}: {name} must be true or false, but is {value!r}")
        return bool(value)

    def only(self, **allowed: Any) -> None:
        """Refuse keys with another value than the given one; an absent key has it."""
        for name, value in allowed.items():
            found = self.get(name)
            require(
                found is None or found == value,
                f"{self.where}: {name} must be {value!r} (nothing else is modelled), but is {found!r}",
            )

    def names(self, name: str, kinds: Iterable[str], length: int) -> list[str] | None:
        """A list of `length` names out of `kinds`; None where the key is absent."""
        value = self.get(name)
        if value is None:
            return None
        require(
            isinstance(value, list) and len(value) == length,
            f"{self.where}: {name} must list one entry for each of {length} layers",
        )
        for kind in value:
            require(kind in kinds, f"{self.where}: {name} must hold {' or '.join(kinds)}, but holds {kind!r}")
        return list(value)

    def finish(self, harmless: str) -> None:
        """Refuse every key that was not read and is not known to be harmless."""
        for name in self.data:
            if name not in self.used and name not in _HARMLESS and name not in harmless.split():
                raise UserError(
                    f"{self.where}: unknown key {name!r}: it may change what a forward costs, so the config is refused"
                )


@dataclass(frozen=True)
class Family:
    """How a model_type is read. harmless: keys of its own that leave the cost alone."""

    architectures: tuple[str, ...]
    read: Callable[[Keys], dict[str, Any]]
    harmless: str = ""


def _decoder(keys: Keys) -> dict[str, Any]:
    """What nearly every family shares, under the key names of Llama; windows and MLPs are filled in by the family."""
    heads = keys.count("num_attention_heads")
    kv_heads = keys.count("num_key_value_heads", heads)
    hidden = keys.count("hidden_size")
    require(heads % kv_heads == 0, f"{keys.where}: num_attention_heads must be a multiple of num_key_value_heads")
    if keys.get("head_dim") is None:
        require(hidden % heads == 0, f"{keys.where}: hidden_size must be a multiple of num_attention_heads")
    head_dim = keys.count("head_dim", hidden // heads)
    keys.only(hidden_act="silu")
    return {
        "hidden_size": hidden,
        "vocab_size": keys.count("vocab_size"),
        "query_size": heads * head_dim,
        "kv_size": kv_heads * head_dim,
        "head_dim": head_dim,
        "num_experts": 0,
        "experts_per_token": 0,
        "expert_size": 0,
        "router_size": 0,
        "conv_widths": (0, 0),
        "max_context": keys.count("max_position_embeddings"),
        "window_by_layer": (None,) * keys.layers("num_hidden_layers"),
        "tied_embedding": keys.flag("tie_word_embeddings"),
    }


def _dense(keys: Keys, base: dict[str, Any]) -> dict[str, Any]:
    return base | {"mlp_size": keys.count("intermediate_size"), "dense_layers": len(base["window_by_layer"])}


def _experts(keys: Keys, base: dict[str, Any], names: tuple[str, ...], size: str) -> dict[str, Any]:
    """Experts whose number stands under one of `names` (or the same under several) and their width under `size`."""
    given = {keys.count(name) for name in names if keys.get(name) is not None}
    require(bool(given), f"{keys.where}: missing key {names[0]!r}")
    require(len(given) == 1, f"{keys.where}: {' and '.join(names)} must be equal, but are {sorted(given)}")
    experts = given.pop()
    chosen = keys.count("num_experts_per_tok")
    require(chosen <= experts, f"{keys.where}: num_experts_per_tok <= {experts} experts must hold, but is {chosen}")
    return base | {"num_experts": experts, "experts_per_token": chosen, "expert_size": keys.count(size)}


def _window(keys: Keys, base: dict[str, Any], used: bool = True) -> dict[str, Any]:
    """One window for all layers where `sliding_window` is a number and `used`."""
    window = keys.get("sliding_window")
    if window is None or not used:
        return base
    return base | {"window_by_layer": (keys.count("sliding_window"),) * len(base["window_by_layer"])}


def _window_of_kinds(keys: Keys, base: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """A window in the layers of kind sliding_attention."""
    window = keys.count("sliding_window") if "sliding_attention" in kinds else None
    return base | {"window_by_layer": tuple(window if kind == "sliding_attention" else None for kind in kinds)}


def _llama(keys: Keys) -> dict[str, Any]:
    bias = keys.flag("attention_bias")
    own = {"attention_bias": bias, "output_bias": bias, "mlp_bias": keys.flag("mlp_bias")}
    return _dense(keys, _decoder(keys)) | own


def _mistral(keys: Keys) -> dict[str, Any]:
    return _window(keys, _dense(keys, _decoder(keys)))


def _qwen_windows(keys: Keys, base: dict[str, Any]) -> dict[str, Any]:
    """Where `use_sliding_window` is set, the layers from `max_window_layers` on (or those listed) have a window."""
    layers = len(base["window_by_layer"])
    used = keys.flag("use_sliding_window")
    kinds = keys.names("layer_types", ("full_attention", "sliding_attention"), layers)
    first = keys.count("max_window_layers", layers, least=0)
    if not used:
        require(
            kinds is None or "sliding_attention" not in kinds,
            f"{keys.where}: layer_types must not hold sliding_attention where use_sliding_window is false",
        )
        keys.get("sliding_window")
        return base
    default = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return _window_of_kinds(keys, base, default if kinds is None else kinds)


def _qwen2(keys: Keys) -> dict[str, Any]:
    """Query, key and value have biases, the output projection none."""
    return _qwen_windows(keys, _dense(keys, _decoder(keys))) | {"attention_bias": True}


def _qwen3_attention(keys: Keys) -> dict[str, Any]:
    bias = keys.flag("attention_bias")
    return {"attention_bias": bias, "output_bias": bias, "qk_norm": True}


def _qwen3(keys: Keys) -> dict[str, Any]:
    return _qwen_windows(keys, _dense(keys, _decoder(keys))) | _qwen3_attention(keys)


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    """Experts but in the layers that `mlp_only_layers` and `decoder_sparse_step` leave dense; one window for all."""
    base = _experts(keys, _decoder(keys), ("num_experts", "num_local_experts"), "moe_intermediate_size")
    layers = len(base["window_by_layer"])
    keys.count("max_window_layers", layers, least=0)  # published, but this family's attention ignores it
    step, only = keys.count("decoder_sparse_step", 1), keys.get("mlp_only_layers")
    only = [] if only is None else only
    require(
        isinstance(only, list) and all(type(i) is int for i in only),
        f"{keys.where}: mlp_only_layers must be a list of layer numbers, but is {only!r}",
    )
    dense = sum((i + 1) % step != 0 or i in only for i in range(layers))
    width = keys.count("intermediate_size") if dense or keys.get("intermediate_size") is not None else 0
    own = {"dense_layers": dense, "mlp_size": width if dense else 0}
    return _window(keys, base, keys.flag("use_sliding_window")) | own | _qwen3_attention(keys)


def _mixtral(keys: Keys) -> dict[str, Any]:
    return _window(keys, _experts(keys, _decoder(keys), ("num_local_experts",), "intermediate_size"))


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    """Windows in every other layer, from the first; attention sinks; biases everywhere but in the LM head."""
    base = _experts(keys, _decoder(keys), ("num_local_experts",), "intermediate_size")
    layers = len(base["window_by_layer"])
    keys.only(experts_per_token=base["experts_per_token"])  # a second name of the same number
    kinds = keys.names("layer_types", ("full_attention", "sliding_attention"), layers)
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    bias = keys.flag("attention_bias", True)
    own = {"attention_bias": bias, "output_bias": bias, "mlp_bias": True, "attention_sinks": True}
    return _window_of_kinds(keys, base, default if kinds is None else kinds) | own


def _gemma3_text(keys: Keys) -> dict[str, Any]:
    """Windows in all but every sixth layer; four norms a layer; the embedding is the LM head unless said."""
    keys.only(hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
    base = _dense(keys, _decoder(keys))
    layers = len(base["window_by_layer"])
    kinds = keys.names("layer_types", ("full_attention", "sliding_attention"), layers)
    own, published = keys.get("_sliding_window_pattern"), keys.get("sliding_window_pattern")
    every = keys.count("sliding_window_pattern" if own is None else "_sliding_window_pattern", 6)
    require(None in (own, published) or own == published, f"{keys.where}: sliding_window_pattern is given twice")
    default = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    bias = keys.flag("attention_bias")
    own_keys = {"attention_bias": bias, "output_bias": bias, "qk_norm": True, "norms_per_layer": 4}
    tied = {"tied_embedding": keys.flag("tie_word_embeddings", True)}
    return _window_of_kinds(keys, base, default if kinds is None else kinds) | own_keys | tied


def _llada(keys: Keys) -> dict[str, Any]:
    """LLaDA's own key names (OLMo's); only the published kind of block is modelled."""
    heads, hidden = keys.count("n_heads"), keys.count("d_model")
    kv_heads = keys.count("n_kv_heads", heads)
    require(hidden % heads == 0, f"{keys.where}: d_model must be a multiple of n_heads")
    vocabulary = keys.count("embedding_size", keys.count("vocab_size"))
    bias = keys.flag("include_bias")
    keys.only(
        activation_type="silu", alibi=False, attention_layer_norm=False, attention_layer_norm_with_affine=True,
        bias_for_layer_norm=False, block_group_size=1, block_type="llama", input_emb_norm=False, layer_norm_type="rms",
        layer_norm_with_affine=True, multi_query_attention=None, rope=True, scale_logits=False,
    )  # fmt: skip
    return {
        "hidden_size": hidden,
        "vocab_size": vocabulary,
        "query_size": hidden,
        "kv_size": kv_heads * (hidden // heads),
        "head_dim": hidden // heads,
        "num_experts": 0,
        "experts_per_token": 0,
        "expert_size": 0,
        "router_size": 0,
        "conv_widths": (0, 0),
        "max_context": keys.count("max_sequence_length"),
        "window_by_layer": (None,) * keys.layers("n_layers"),
        "tied_embedding": keys.flag("weight_tying"),
        "attention_bias": bias or keys.flag("include_qkv_bias"),
        "output_bias": bias,
        "lm_head_bias": False,
        "mlp_bias": bias,
        "mlp_size": keys.count("mlp_hidden_size"),
        "dense_layers": keys.count("n_layers"),
    }


def _llada2_moe(keys: Keys) -> dict[str, Any]:
    """The first `first_k_dense_replace` layers are dense; shared experts are one MLP of their widths' sum."""
    base = _experts(keys, _decoder(keys), ("num_experts",), "moe_intermediate_size")
    dense = keys.count("first_k_dense_replace", 0, least=0)
    shared = keys.count("num_shared_experts", 0, least=0)
    bias = keys.flag("use_bias")
    keys.only(use_sliding_window=False, norm_head=False)
    keys.get("sliding_window"), keys.get("max_window_layers")  # read only where use_sliding_window is set
    return base | {
        "dense_layers": min(dense, len(base["window_by_layer"])),
        "mlp_size": keys.count("intermediate_size"),
        "shared_expert_size": shared * base["expert_size"],
        "attention_bias": keys.flag("use_qkv_bias"),
        "output_bias": bias,
        "qk_norm": keys.flag("use_qk_norm", True),
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(("LlamaForCausalLM",), _llama),
    "mistral": Family(("MistralForCausalLM",), _mistral),
    "qwen2": Family(("Qwen2ForCausalLM",), _qwen2),
    "qwen3": Family(("Qwen3ForCausalLM",), _qwen3),
    "qwen3_moe": Family(("Qwen3MoeForCausalLM",), _qwen3_moe, "norm_topk_prob"),
    "mixtral": Family(("MixtralForCausalLM",), _mixtral, "router_jitter_noise"),
    "gpt_oss": Family(("GptOssForCausalLM",), _gpt_oss, "initial_context_length swiglu_limit"),
    "gemma3_text": Family(
        ("Gemma3ForCausalLM",),
        _gemma3_text,
        "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar rope_local_base_freq",
    ),
    "llada": Family(
        ("LLaDAModelLM",),
        _llada,
        "alibi_bias_max attention_layer_norm_with_affine embedding_dropout flash_attention init_cutoff_factor "
        "init_device init_fn init_std layer_norm_eps mlp_ratio precision residual_dropout rope_full_precision",
    ),
    "llada2_moe": Family(
        ("LLaDA2MoeModelLM",),
        _llada2_moe,
        "embedding_dropout moe_router_enable_expert_bias n_group norm_topk_prob output_dropout rotary_dim "
        "routed_scaling_factor router_dtype score_function topk_group",
    ),
    "Dream": Family(("DreamModel",), _qwen2, "use_mrope"),
    "sdar": Family(("SDARForCausalLM",), _qwen3, "block_size debug fuse_cross_entropy"),
    "sdar_moe": Family(
        ("SDARMoeForCausalLM",), _qwen3_moe, "block_size debug fuse_cross_entropy norm_topk_prob router_jitter_noise"
    ),
}


def _quantisation(keys: Keys) -> str | None:
    """fp8 or mxfp4 from `quantization_config`; None without one. Other methods are refused."""
    given = keys.get("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method not in ("fp8", "mxfp4"):
        raise known("quantization_config quant_method", str(method), ("fp8", "mxfp4"))
    return str(method)


def spec_from_json(path: Path, name: str) -> ModelSpec:
    """The costs of the model that a `config.json` describes.

    Raises UserError for an unknown model_type or architecture (listing the known ones), an unknown key, a missing or
    impossible value, and a file that is not valid JSON.
    """
    data = read_json(path)
    kind = data.get("model_type")
    if kind == "zaya":
        return spec_from_config(model_config_from_json(path), name)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise known(f"model_type in {path}", str(kind), (*FAMILIES, "zaya"))
    family = FAMILIES[kind]
    architectures = data.get("architectures")
    require(
        architectures is None or (isinstance(architectures, list) and all(isinstance(a, str) for a in architectures)),
        f"{path}: architectures must be a list of names, but is {architectures!r}",
    )
    for architecture in architectures or ():
        if architecture not in family.architectures:
            raise known(f"architecture of {kind} in {path}", architecture, family.architectures)
    keys = Keys(data, str(path))
    sizes = family.read(keys) | {"quantisation": _quantisation(keys)}
    keys.finish(family.harmless)
    return ModelSpec(name=name, architecture=kind, **sizes)
