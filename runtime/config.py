"""What to run: model, decoding, kernels and workload, as frozen data. Torch-free, so that predictions start fast."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from hardware.files import UserError, build, known, read_json

LayerType = Literal["hybrid", "hybrid_sliding"]
Sampler = Literal["autoregressive", "two_forward", "single_forward", "denoising"]
ExpertMode = Literal["loop", "grouped", "gather", "dense"]
Engine = Literal["eager", "compiled", "lean", "graphs"]
SAMPLER_NAMES: tuple[Sampler, ...] = get_args(Sampler)
EXPERT_MODES: tuple[ExpertMode, ...] = get_args(ExpertMode)
ENGINES: tuple[Engine, ...] = get_args(Engine)
DType = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# config.json keys of `transformers` that say nothing about the forward; every other unknown key is an error.
_IGNORED_KEYS = frozenset(
    "architectures attention_dropout auto_map chunk_size_feed_forward dtype hidden_act id2label initializer_range "
    "is_encoder_decoder label2id model_type output_attentions output_hidden_states output_router_logits "
    "partial_rotary_factor problem_type return_dict torch_dtype transformers_version use_cache _name_or_path".split()
)


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding of one layer type: base and the rotated share of the head."""

    rope_theta: float
    partial_rotary_factor: float = 0.5
    rope_type: Literal["default"] = "default"

    def __post_init__(self) -> None:
        require(self.rope_theta > 0, f"rope_theta > 0 must hold, but got {self.rope_theta}")
        require(
            0 < self.partial_rotary_factor <= 1,
            f"0 < partial_rotary_factor <= 1 must hold, but got {self.partial_rotary_factor}",
        )


def _default_rope() -> dict[str, RopeParameters]:
    return {"hybrid": RopeParameters(5_000_000.0), "hybrid_sliding": RopeParameters(10_000.0)}


@dataclass(frozen=True)
class ModelConfig:
    """The ZAYA hyperparameters under the field names of the Hugging Face `config.json`; defaults are ZAYA1-8B's.

    `mask_token_id` is ours: the token that fills undecided positions of a diffusion draft (None: the model was never
    converted and can only decode autoregressively).
    """

    vocab_size: int = 262_272
    hidden_size: int = 2048
    num_hidden_layers: int = 40
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    num_experts: int = 16
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 2048
    router_hidden_size: int = 256
    cca_time0: int = 2
    cca_time1: int = 2
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    lm_head_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] = ()
    rope_parameters: dict[str, RopeParameters] = field(default_factory=_default_rope)
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 106
    mask_token_id: int | None = None

    def __post_init__(self) -> None:
        most = 10_000  # of layers that are listed one by one
        require(
            self.num_hidden_layers <= most, f"num_hidden_layers <= {most} must hold, but got {self.num_hidden_layers}"
        )
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("hybrid",) * self.num_hidden_layers)
        for name in (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim num_experts "
            "moe_intermediate_size router_hidden_size cca_time0 cca_time1 max_position_embeddings"
        ).split():
            value = getattr(self, name)
            require(value >= 1, f"{name} >= 1 must hold, but got {value}")
        require(
            self.cca_time0 + self.cca_time1 >= 3,
            "cca_time0 + cca_time1 >= 3 must hold (the cache keeps the columns that the convolutions look back on), "
            f"but got {self.cca_time0} + {self.cca_time1}",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads must be a multiple of num_key_value_heads, "
            f"but got {self.num_attention_heads} and {self.num_key_value_heads}",
        )
        require(
            (self.num_key_value_heads * self.head_dim) % 2 == 0,
            "num_key_value_heads * head_dim must be even (half of the value is delayed), "
            f"but got {self.num_key_value_heads} * {self.head_dim}",
        )
        require(
            self.num_experts_per_tok == 1,
            f"ZAYA routes to one expert: num_experts_per_tok must be 1, but got {self.num_experts_per_tok}",
        )
        require(
            len(self.layer_types) == self.num_hidden_layers,
            f"layer_types must have num_hidden_layers = {self.num_hidden_layers} entries, "
            f"but has {len(self.layer_types)}",
        )
        if "hybrid_sliding" in self.layer_types:
            require(
                self.sliding_window is not None and self.sliding_window >= 1,
                f"sliding_window >= 1 must be set for hybrid_sliding layers, but got {self.sliding_window}",
            )
        for kind in set(self.layer_types):
            require(kind in self.rope_parameters, f"rope_parameters must have an entry for {kind!r} layers")
            rotated = int(self.head_dim * self.rope_parameters[kind].partial_rotary_factor)
            require(
                rotated >= 2 and rotated % 2 == 0,
                f"the rotated part of head_dim must be even, but got {rotated} of {self.head_dim}",
            )
        for name in ("pad_token_id", "bos_token_id", "mask_token_id"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < self.vocab_size,
                f"0 <= {name} < vocab_size = {self.vocab_size} must hold, but got {value}",
            )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence tokens as a tuple, however config.json wrote them."""
        eos = self.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)

    @property
    def query_size(self) -> int:
        """Width of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key projection, and of the whole value."""
        return self.num_key_value_heads * self.head_dim

    @property
    def conv_history(self) -> int:
        """Earlier positions that a CCA output needs: cca_time0 + cca_time1 - 2."""
        return self.cca_time0 + self.cca_time1 - 2


def model_config_from_json(path: Path) -> ModelConfig:
    """Read the `config.json` of a `zaya` checkpoint. Raises UserError for unknown keys and impossible values."""
    data = read_json(path)
    kind = data.get("model_type")
    require(kind == "zaya", f"{path}: model_type must be 'zaya', but is {kind!r}")
    require(
        data.get("hidden_act", "silu") == "silu",
        f"{path}: hidden_act must be 'silu', but is {data.get('hidden_act')!r}",
    )
    kept: dict[str, Any] = {k: v for k, v in data.items() if k not in _IGNORED_KEYS}
    rope = kept.get("rope_parameters")
    if isinstance(rope, dict):  # the published config carries a stray rope_type beside the nested ones
        # The reference rotates the whole head where an entry names no factor, and does not read the top-level one.
        kept["rope_parameters"] = {
            k: {"partial_rotary_factor": 1.0} | v if isinstance(v, dict) else v
            for k, v in rope.items()
            if k != "rope_type"
        }
    elif rope is None:
        kept.pop("rope_parameters", None)
    if kept.get("layer_types") is None:
        kept.pop("layer_types", None)
    return build(ModelConfig, kept, str(path))


SETTING_OF: dict[str, Sampler] = {  # settings of one sampler; any other sampler must leave them at their default
    "anchor_draft": "two_forward",
    "proposal_levels": "single_forward",
    "denoising_steps": "denoising",
    "confidence_threshold": "denoising",
    "verify": "denoising",
}


@dataclass(frozen=True)
class DecodingConfig:
    """How tokens are produced. Temperatures of 0 mean argmax.

    draft_tokens: K, the tokens drafted per step; the block of a denoising step.
    mixing_weight: w, the share of the autoregressive logits in the target; w = 1 is lossless.
    draft_temperature: of drafts that a verification judges.
    anchor_draft: two_forward takes its first draft from the anchor's own (autoregressive) logits.
    proposal_levels: the acceptance counts for which single_forward drafts ahead, ascending from 0; None: all, 0 .. K.
    denoising_steps: S, the most forwards that fill a block; each decides at least ceil(K / S) of its tokens.
    confidence_threshold: a step also decides every token whose probability reaches it; None: never more than its share.
    verify: denoising is followed by an autoregressive verification, which makes it lossless at w = 1.
    """

    sampler: Sampler = "autoregressive"
    draft_tokens: int = 16
    mixing_weight: float = 1.0
    temperature: float = 0.0
    draft_temperature: float = 0.0
    anchor_draft: bool = False
    proposal_levels: tuple[int, ...] | None = None
    denoising_steps: int = 1
    confidence_threshold: float | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLER_NAMES:
            raise known("sampler", self.sampler, SAMPLER_NAMES)
        require(self.draft_tokens >= 1, f"draft_tokens >= 1 must hold, but got {self.draft_tokens}")
        require(0 <= self.mixing_weight <= 1, f"0 <= mixing_weight <= 1 must hold, but got {self.mixing_weight}")
        for name in ("temperature", "draft_temperature"):
            require(0 <= getattr(self, name) < math.inf, f"{name} >= 0 must hold, but got {getattr(self, name)}")
        for name, sampler in SETTING_OF.items():
            require(
                self.sampler == sampler or getattr(self, name) == _DEFAULTS[name],
                f"{name} is a setting of {sampler}, but the sampler is {self.sampler}",
            )
        if self.proposal_levels is not None:
            levels = self.proposal_levels
            require(
                levels[:1] == (0,) and list(levels) == sorted(set(levels)) and levels[-1] <= self.draft_tokens,
                f"proposal_levels must ascend from 0 to at most draft_tokens = {self.draft_tokens}, but are {levels}",
            )
        require(
            1 <= self.denoising_steps <= self.draft_tokens,
            f"1 <= denoising_steps <= draft_tokens = {self.draft_tokens} must hold, but got {self.denoising_steps}",
        )
        require(
            self.confidence_threshold is None or 0 <= self.confidence_threshold <= 1,
            f"0 <= confidence_threshold <= 1 must hold, but got {self.confidence_threshold}",
        )
        if self.sampler == "autoregressive":
            require(
                self.mixing_weight == 1 and self.draft_temperature == 0,
                "autoregressive decoding drafts nothing: mixing_weight must be 1 and draft_temperature 0, "
                f"but got {self.mixing_weight} and {self.draft_temperature}",
            )
        if self.sampler == "denoising" and not self.verify:
            require(
                self.mixing_weight == 1 and self.draft_temperature == 0,
                "denoising without verify has nothing to mix or to judge: mixing_weight must be 1 and "
                f"draft_temperature 0, but got {self.mixing_weight} and {self.draft_temperature}",
            )
        require(
            self.draft_temperature == 0 or self.denoising_steps == 1,
            # A later step sees what an earlier one drew, so that accepting it would tell of drafts not yet judged.
            f"drafts of {self.denoising_steps} denoising steps can be verified without loss at draft_temperature 0 "
            f"only, but got {self.draft_temperature}",
        )

    @property
    def levels(self) -> tuple[int, ...]:
        """The acceptance counts that single_forward drafts ahead for."""
        return self.proposal_levels if self.proposal_levels is not None else tuple(range(self.draft_tokens + 1))

    @property
    def drafts(self) -> bool:
        """Whether masks are filled, for which the model must have a mask token."""
        return self.sampler != "autoregressive"

    @property
    def lossless(self) -> bool:
        """Whether the committed tokens follow the autoregressive distribution."""
        return self.mixing_weight == 1 and (self.sampler != "denoising" or self.verify)

    @property
    def autoregressive(self) -> DecodingConfig:
        """The baseline that this setting is compared to."""
        return DecodingConfig(temperature=self.temperature)

    @property
    def slots(self) -> int:
        """Token slots per sequence in the widest forward of a step."""
        block = self.draft_tokens + 1
        if self.sampler == "autoregressive":
            return 1
        if self.sampler == "single_forward":
            return block * (1 + len(self.levels))
        if self.sampler == "denoising" and not self.verify:
            return 2 * self.draft_tokens  # the block before, which enters the cache, and the masks
        return block

    @property
    def kept_slots(self) -> int:
        """Slots of a forward that can enter the cache, per sequence; proposals and masks never do."""
        if self.sampler == "autoregressive":
            return 1
        return self.draft_tokens if self.sampler == "denoising" and not self.verify else self.draft_tokens + 1

    @property
    def forwards_per_step(self) -> int:
        """Model forwards in one decoding step, at most: a confidence threshold can end a block's steps earlier."""
        if self.sampler == "denoising":
            share = -(-self.draft_tokens // self.denoising_steps)  # tokens that a forward decides at least
            return -(-self.draft_tokens // share) + self.verify
        return 2 if self.sampler == "two_forward" else 1


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(DecodingConfig)}


@dataclass(frozen=True)
class KernelConfig:
    """How forwards run on this device.

    engine: eager, plain torch operators, the reference; compiled, the fused forward through `torch.compile`; lean, the
    fused forward with native CPU kernels; graphs, the fused forward with Triton kernels, whole steps replayed as CUDA
    or HIP graphs.
    tilings: of the Triton kernels, by the largest token count of a bucket, what replaces the kernel's default.
    experts: how an eager forward runs the experts, by the largest token count of a bucket; the last bucket also serves
    larger counts. loop: one matmul per expert that is hit; grouped: tokens sorted by expert, one grouped matmul;
    gather: each token's expert weights gathered, one batched matmul; dense: every expert on every token, then select.
    threads: of a CPU; None leaves the process's setting.
    """

    experts: dict[int, ExpertMode] = field(default_factory=lambda: {1: "gather", 1_000_000: "loop"})
    threads: int | None = None
    engine: Engine = "eager"
    tilings: dict[str, dict[int, dict[str, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise known("engine", self.engine, ENGINES)
        require(len(self.experts) > 0, "experts must have at least one bucket")
        require(all(m >= 1 for m in self.experts), f"expert buckets must be >= 1, but got {sorted(self.experts)}")
        require(self.threads is None or self.threads >= 1, f"threads >= 1 must hold, but got {self.threads}")

    def expert_mode(self, tokens: int) -> ExpertMode:
        """The mode for a forward of `tokens` tokens: the smallest bucket that holds them, else the largest."""
        fitting = [m for m in self.experts if m >= tokens]
        return self.experts[min(fitting) if fitting else max(self.experts)]

    def tiling(self, kernel: str, tokens: int) -> dict[str, int] | None:
        """The tiling set for this kernel at so many tokens, or None: the kernel's default serves."""
        buckets = self.tilings.get(kernel, {})
        fitting = [m for m in buckets if m >= tokens]
        return buckets[min(fitting)] if fitting else None


@dataclass(frozen=True)
class Workload:
    """What is asked of the decoder: sequences at once, prompt and generated tokens of each, and the weights' dtype."""

    batch: int = 1
    prompt_tokens: int = 128
    generated_tokens: int = 128
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "generated_tokens"):
            value = getattr(self, name)
            require(value >= 1, f"{name} >= 1 must hold, but got {value}")


def replace(config: Any, **changes: Any) -> Any:
    """`dataclasses.replace`, kept here so that callers need one import."""
    return dataclasses.replace(config, **changes)
