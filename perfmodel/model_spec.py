"""What a forward of a decoder costs to hold: its sizes, and from them parameters, cache bytes and state bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hardware.files import UserError, known
from perfmodel.precision import Precision, quantised, stored_bytes, uniform
from runtime.config import ModelConfig, require

_BUNDLED_CHECKPOINTS = Path(__file__).resolve().parent.parent / "runtime" / "checkpoints"
_BUILT_IN = Path(__file__).resolve().parent / "models"


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a decoder, free of anything that does not change what a forward costs.

    Every layer is attention, then an MLP: dense (gate, up, down of `mlp_size`) in `dense_layers` of them, a mixture of
    experts in the others. `window_by_layer` holds, per layer, the most tokens its attention sees, the current one
    included (None: all). conv_widths (0, 0): plain attention, else ZAYA's compressed convolutional one (CCA).
    """

    name: str
    hidden_size: int
    vocab_size: int
    query_size: int  # query heads * head size
    kv_size: int  # key heads * head size; the value is as wide
    head_dim: int
    num_experts: int  # 0: every layer is dense
    experts_per_token: int
    expert_size: int  # gate, up and down are hidden_size x expert_size each
    router_size: int  # hidden width of an MLP router; 0: one matrix
    conv_widths: tuple[int, int]  # taps of the depthwise and of the grouped convolution over q|k
    max_context: int
    window_by_layer: tuple[int | None, ...]
    tied_embedding: bool = True
    attention_bias: bool = False  # of the query, key and value projections
    lm_head_bias: bool = False
    architecture: str = "zaya"
    mlp_size: int = 0
    dense_layers: int = 0
    shared_expert_size: int = 0  # width of the expert that every token takes; 0: none
    output_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False  # of dense MLPs, experts and a one-matrix router
    qk_norm: bool = False
    norms_per_layer: int = 2
    attention_sinks: bool = False
    quantisation: str | None = None  # what the checkpoint was published in: fp8, or mxfp4 (experts alone)

    def __post_init__(self) -> None:
        require(
            0 <= self.dense_layers <= self.layers,
            f"0 <= dense_layers <= {self.layers} layers must hold, but got {self.dense_layers} ({self.name})",
        )
        require(
            self.num_experts > 0 or self.dense_layers == self.layers,
            f"a layer is dense or has experts, but {self.name} has {self.dense_layers} dense layers of {self.layers} "
            "and no experts",
        )
        require(
            self.dense_layers == 0 or self.mlp_size > 0, f"mlp_size > 0 must hold for dense layers ({self.name} has 0)"
        )
        require(
            self.experts_per_token <= self.num_experts,
            f"experts_per_token <= num_experts must hold, but got {self.experts_per_token} and {self.num_experts}",
        )

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.window_by_layer)

    @property
    def moe_layers(self) -> int:
        """Layers whose MLP is a mixture of experts."""
        return self.layers - self.dense_layers

    @property
    def convolutional(self) -> bool:
        """Whether attention is CCA."""
        return self.conv_widths != (0, 0)

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: queries and keys together; none without one."""
        return self.query_size + self.kv_size if self.convolutional else 0

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads."""
        return self.query_size // self.head_dim, self.kv_size // self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert of one layer: gate, up and down."""
        return self._gated(self.expert_size)

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one dense MLP: gate, up and down."""
        return self._gated(self.mlp_size)

    @property
    def shared_expert_parameters(self) -> int:
        """Parameters of one layer's shared expert."""
        return self._gated(self.shared_expert_size)

    def _gated(self, width: int) -> int:
        bias = 2 * width + self.hidden_size if self.mlp_bias and width else 0
        return 3 * self.hidden_size * width + bias

    @property
    def qkv_parameters(self) -> int:
        """Query, key and value projections of one layer (CCA: the current and the delayed half of each value)."""
        width = self.query_size + 2 * self.kv_size
        return width * self.hidden_size + (width if self.attention_bias else 0)

    @property
    def output_parameters(self) -> int:
        """Output projection of one layer."""
        return self.query_size * self.hidden_size + (self.hidden_size if self.output_bias else 0)

    @property
    def cca_parameters(self) -> int:
        """Both convolutions with their biases, and the key temperatures, of one layer."""
        if not self.convolutional:
            return 0
        depthwise, grouped = self.conv_widths
        return self.conv_channels * (depthwise + 1 + self.head_dim * grouped + 1) + self.heads[1]

    @property
    def router_matrix_parameters(self) -> int:
        """The router's matrices of one MoE layer.

        An MLP router has its down-projection, two square layers, and the classes with the skip one; else one matrix.
        """
        if self.router_size:
            return self.router_size * (self.hidden_size + 2 * self.router_size + self.num_experts + 1)
        return self.num_experts * self.hidden_size

    def parameters_by_component(self) -> dict[str, int]:
        """Parameters of every component over all layers; they sum to what the live module holds.

        Balancing biases of a router are buffers, not parameters, as in the references. A tied LM head is counted once,
        as the embedding.
        """
        n, hidden, router = self.layers, self.hidden_size, self.router_size
        head = 0 if self.tied_embedding else self.vocab_size * hidden
        if self.convolutional:  # 2 norms and 2x4 scales a layer; final norm, input scale
            norms = n * 10 * hidden + 3 * hidden
        else:
            per_head = 2 * self.head_dim * self.qk_norm + self.heads[0] * self.attention_sinks
            norms = n * (self.norms_per_layer * hidden + per_head) + hidden
        # An MLP router has 3 biases, a norm, and but for layer 0 a scale of its state.
        router_vectors = self.moe_layers * 5 * router - router if router else self.moe_layers * self._router_bias
        return {
            "embedding": self.vocab_size * hidden,
            "norms_residual": norms,
            "qkv": n * self.qkv_parameters,
            "cca": n * self.cca_parameters,
            "output": n * self.output_parameters,
            "mlp": self.dense_layers * self.mlp_parameters,
            "router": self.moe_layers * self.router_matrix_parameters + router_vectors,
            "experts": self.moe_layers * self.num_experts * self.expert_parameters,
            "shared_expert": self.moe_layers * self.shared_expert_parameters,
            "lm_head": head + (self.vocab_size if self.lm_head_bias else 0),
        }

    @property
    def _router_bias(self) -> int:
        return self.num_experts if self.mlp_bias else 0

    @property
    def parameters(self) -> int:
        """All parameters, the tied embedding once."""
        return sum(self.parameters_by_component().values())

    @property
    def published_precision(self) -> Precision:
        """What the published checkpoint runs in; bfloat16 where it is not quantised."""
        if self.quantisation == "mxfp4":
            return quantised("bfloat16", experts="mxfp4")
        return quantised("fp8") if self.quantisation == "fp8" else uniform("bfloat16")

    def stored_kv_bytes_per_token(self, dtype: str) -> float:
        """Bytes the KV cache *stores* for one token of one sequence. What a step reads is another quantity.

        A runtime may free what lies outside the window of a sliding layer; this counts every layer.
        """
        return self.layers * 2 * self.kv_size * stored_bytes(dtype)

    def state_bytes_per_sequence(self, dtype: str) -> float:
        """CCA state of one sequence: the last pre-convolution q|k columns and one delayed-value projection a layer.

        The runtime keeps a few more columns so that rejected drafts can be undone; this counts what the model needs.
        """
        if not self.convolutional:
            return 0.0
        columns = sum(self.conv_widths) - 2
        return self.layers * (columns * self.conv_channels + self.kv_size // 2) * stored_bytes(dtype)


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
        output_bias=config.attention_bias,
        lm_head_bias=config.lm_head_bias,
    )


def known_models() -> list[str]:
    """Names that `load_spec` knows: the built-in configurations and every checkpoint that ships."""
    return sorted(
        {p.stem for p in _BUILT_IN.glob("*.json")} | {p.parent.name for p in _BUNDLED_CHECKPOINTS.glob("*/config.json")}
    )


def load_spec(name_or_path: str | Path) -> ModelSpec:
    """A model by name, or by the path of a checkpoint folder or of its `config.json`.

    Raises UserError for an unknown name (listing the known ones) and for a config that cannot be read.
    """
    from perfmodel.families import spec_from_json

    name = str(name_or_path)
    if name in known_models():
        built_in = _BUILT_IN / f"{name}.json"
        return spec_from_json(built_in if built_in.exists() else _BUNDLED_CHECKPOINTS / name / "config.json", name)
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError):  # too long for a path, or the home of nobody
        exists = False
    if not exists:
        raise known("model", name, known_models())
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} holds no config.json")
    return spec_from_json(file, file.resolve().parent.name if file.name == "config.json" else file.stem)


def require_context(spec: ModelSpec, positions: int) -> None:
    """Refuse positions beyond what the model was built for."""
    require(
        positions <= spec.max_context,
        f"context + slots <= max_position_embeddings must hold, but got {positions} > {spec.max_context} ({spec.name})",
    )
