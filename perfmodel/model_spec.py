"""What a forward of a decoder costs to hold: its sizes, and from them parameters, cache bytes and state bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hardware.files import UserError, known
from runtime.config import DTYPE_BYTES, ModelConfig, model_config_from_json, require

_BUNDLED_CHECKPOINTS = Path(__file__).resolve().parent.parent / "runtime" / "checkpoints"


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a decoder, free of anything that does not change what a forward costs.

    `window_by_layer` holds, per layer, the most cached tokens its attention sees (None: all). Layers are otherwise
    alike, except that the first has no router state to scale.
    """

    name: str
    hidden_size: int
    vocab_size: int
    query_size: int  # query heads * head size
    kv_size: int  # key heads * head size; the value is as wide
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_size: int  # gate, up and down are hidden_size x expert_size each
    router_size: int
    conv_widths: tuple[int, int]  # taps of the depthwise and of the grouped convolution over q|k
    max_context: int
    window_by_layer: tuple[int | None, ...]
    tied_embedding: bool = True
    attention_bias: bool = False
    lm_head_bias: bool = False

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.window_by_layer)

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: queries and keys together."""
        return self.query_size + self.kv_size

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads."""
        return self.query_size // self.head_dim, self.kv_size // self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert of one layer: gate, up and down."""
        return 3 * self.hidden_size * self.expert_size

    @property
    def qkv_parameters(self) -> int:
        """Query, key, current-value and delayed-value projections of one layer (the values are half a value each)."""
        width = self.query_size + 2 * self.kv_size
        return width * self.hidden_size + (width if self.attention_bias else 0)

    @property
    def output_parameters(self) -> int:
        """Output projection of one layer."""
        return self.query_size * self.hidden_size + (self.hidden_size if self.attention_bias else 0)

    @property
    def cca_parameters(self) -> int:
        """Both convolutions with their biases, and the key temperatures, of one layer."""
        depthwise, grouped = self.conv_widths
        return self.conv_channels * (depthwise + 1 + self.head_dim * grouped + 1) + self.heads[1]

    @property
    def router_matrix_parameters(self) -> int:
        """The router's matrices of one layer: down-projection, two square layers, and the classes with the skip one."""
        return self.router_size * (self.hidden_size + 2 * self.router_size + self.num_experts + 1)

    def parameters_by_component(self) -> dict[str, int]:
        """Parameters of every component over all layers; they sum to what the live module holds.

        The balancing biases of the router are buffers, not parameters, as in the reference. A tied LM head is counted
        once, as the embedding.
        """
        n, hidden, router = self.layers, self.hidden_size, self.router_size
        head = 0 if self.tied_embedding else self.vocab_size * hidden
        return {
            "embedding": self.vocab_size * hidden,
            "norms_residual": n * 10 * hidden + 3 * hidden,  # 2 norms and 2x4 scales a layer; final norm, input scale
            "qkv": n * self.qkv_parameters,
            "cca": n * self.cca_parameters,
            "output": n * self.output_parameters,
            "router": n * (self.router_matrix_parameters + 5 * router)
            - router,  # 3 biases, norm, state scale but in layer 0
            "experts": n * self.num_experts * self.expert_parameters,
            "lm_head": head + (self.vocab_size if self.lm_head_bias else 0),
        }

    @property
    def parameters(self) -> int:
        """All parameters, the tied embedding once."""
        return sum(self.parameters_by_component().values())

    def stored_kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes the KV cache *stores* for one token of one sequence. What a step reads is another quantity."""
        return self.layers * 2 * self.kv_size * DTYPE_BYTES[dtype]

    def state_bytes_per_sequence(self, dtype: str) -> int:
        """CCA state of one sequence: the last pre-convolution q|k columns and one delayed-value projection a layer.

        The runtime keeps a few more columns so that rejected drafts can be undone; this counts what the model needs.
        """
        columns = sum(self.conv_widths) - 2
        return self.layers * (columns * self.conv_channels + self.kv_size // 2) * DTYPE_BYTES[dtype]


def spec_from_config(config: ModelConfig, name: str) -> ModelSpec:
    """The costs of a ZAYA model from its hyperparameters."""
    return ModelSpec(
        name=name,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        query_size=config.query_size,
        kv_size=config.kv_size,
        head_dim=config.head_dim,
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_size=config.moe_intermediate_size,
        router_size=config.router_hidden_size,
        conv_widths=(config.cca_time0, config.cca_time1),
        max_context=config.max_position_embeddings,
        window_by_layer=tuple(
            config.sliding_window if kind == "hybrid_sliding" else None for kind in config.layer_types
        ),
        tied_embedding=config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        lm_head_bias=config.lm_head_bias,
    )


def known_models() -> list[str]:
    """Names that `load_spec` knows: the published configuration and every checkpoint that ships."""
    return sorted({"zaya1-8b"} | {p.parent.name for p in _BUNDLED_CHECKPOINTS.glob("*/config.json")})


def load_spec(name_or_path: str | Path) -> ModelSpec:
    """A model by name, or by the path of a checkpoint folder or of its `config.json`.

    Raises UserError for an unknown name (listing the known ones) and for a config that cannot be read.
    """
    name = str(name_or_path)
    if name == "zaya1-8b":
        return spec_from_config(ModelConfig(), name)
    if name in known_models():
        return spec_from_config(model_config_from_json(_BUNDLED_CHECKPOINTS / name / "config.json"), name)
    path = Path(name).expanduser()
    if not path.exists():
        raise known("model", name, known_models())
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} holds no config.json")
    return spec_from_config(model_config_from_json(file), file.resolve().parent.name)


def require_context(spec: ModelSpec, positions: int) -> None:
    """Refuse positions beyond what the model was built for."""
    require(
        positions <= spec.max_context,
        f"context + slots <= max_position_embeddings must hold, but got {positions} > {spec.max_context} ({spec.name})",
    )
