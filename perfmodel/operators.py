"""FLOPs and bytes of one forward by operator, whatever runs it. Arrays in, arrays out.

FLOPs count multiply-adds of matmuls and convolutions twice, as `torch.utils.flop_counter` does; norms, softmax, RoPE
and activations are ignored (below 1% of a forward; their bytes are counted). What an engine adds, such as copies,
padding or launches, is `perfmodel.engine`'s.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perfmodel.experts import ExpertCoverage
from perfmodel.model_spec import ModelSpec
from runtime.config import DTYPE_BYTES

Array = npt.NDArray[np.float64]

LAYER_OPERATORS = ("norms_residual", "qkv", "cca", "attention", "output", "router", "experts")
FORWARD_OPERATORS = ("embedding", *LAYER_OPERATORS, "lm_head")
RESIDUAL_BYTES = 4  # the residual stream is fp32 at any dtype
LOGIT_BYTES = 4  # samplers work on fp32 logits


@dataclass(frozen=True)
class Shape:
    """Forwards to cost: numbers or arrays that broadcast against each other."""

    batch: Array  # sequences
    slots: Array  # token slots per sequence
    context: Array  # cached tokens per sequence
    head_rows: Array  # rows per sequence that the LM head projects

    @property
    def tokens(self) -> Array:
        """Slots of all sequences: the rows of every linear layer."""
        return self.batch * self.slots


def shape(batch: npt.ArrayLike, slots: npt.ArrayLike, context: npt.ArrayLike, head_rows: npt.ArrayLike) -> Shape:
    """Numbers or arrays as a `Shape`, broadcast together."""
    arrays = np.broadcast_arrays(*(np.asarray(a, dtype=float) for a in (batch, slots, context, head_rows)))
    return Shape(*arrays)


@dataclass(frozen=True)
class Matmul:
    """`count` products [rows, inner] x [inner, outer] of one forward, over all layers."""

    count: Array
    rows: Array
    inner: int
    outer: int

    @property
    def flops(self) -> Array:
        """Multiplications and additions of all of them."""
        return 2.0 * self.count * self.rows * self.inner * self.outer


@dataclass(frozen=True)
class OperatorCost:
    """The work of one operator, summed over the layers of a forward.

    weight_bytes: parameters read, each once. kv_bytes: cache and state, read or written. activation_bytes: what lies
    between operators, each written and read once; `activation_set_bytes` of them live at a time, in one layer.
    """

    name: str
    flops: Array  # masked attention scores included, as plain kernels compute them
    least_flops: Array  # without them: no kernel can do less
    weight_bytes: Array
    kv_bytes: Array
    activation_bytes: Array
    activation_set_bytes: Array
    matmuls: tuple[Matmul, ...] = ()

    @property
    def bytes(self) -> Array:
        """Everything moved."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


def expert_matmuls(spec: ModelSpec, count: Array, rows: Array) -> tuple[Matmul, ...]:
    """Gate with up, and down, of `count` experts over all layers with `rows` tokens each."""
    return (
        Matmul(count, rows, spec.hidden_size, 2 * spec.expert_size),
        Matmul(count, rows, spec.expert_size, spec.hidden_size),
    )


def forward_costs(spec: ModelSpec, at: Shape, dtype: str, coverage: ExpertCoverage) -> tuple[OperatorCost, ...]:
    """Costs of one forward in the order of FORWARD_OPERATORS.

    The prefill of T tokens is slots = T at context 0. KV is read once per sequence for all its slots, and at most the
    window of a sliding layer. Raises UserError from a measured `coverage` that does not reach the token count.
    """
    width = DTYPE_BYTES[dtype]
    n, hidden, tokens = spec.layers, spec.hidden_size, at.tokens
    zero = np.zeros(np.shape(tokens))
    layers = zero + n

    def linear(name: str, parameters: float, matmuls: tuple[Matmul, ...], in_out: float, repeat: int = n) -> OperatorCost:
        flops = sum((m.flops for m in matmuls), zero)
        moved = tokens * in_out * width
        return OperatorCost(name, flops, flops, zero + repeat * parameters * width, zero, repeat * moved, moved, matmuls)

    qkv_width = spec.query_size + 2 * spec.kv_size
    router_width = spec.router_size
    row_bytes = hidden * (width + RESIDUAL_BYTES)
    embedding_set = tokens * row_bytes
    # Two norms (fp32 in, dtype out) and two residual additions (branch and residual in, residual out) a layer.
    norm_set = tokens * hidden * (2 * width + 3 * RESIDUAL_BYTES)
    router = (
        Matmul(layers, tokens, hidden, router_width),
        Matmul(2 * layers, tokens, router_width, router_width),
        Matmul(layers, tokens, router_width, spec.num_experts + 1),
    )
    head_tokens = at.batch * at.head_rows
    head = Matmul(zero + 1, head_tokens, hidden, spec.vocab_size)
    head_moved = head_tokens * (hidden * width + spec.vocab_size * LOGIT_BYTES)
    head_bytes = (spec.vocab_size * hidden + (spec.vocab_size if spec.lm_head_bias else 0)) * width
    return (
        OperatorCost(
            "embedding",
            zero,
            zero,
            np.minimum(tokens, spec.vocab_size) * hidden * width,
            zero,
            embedding_set,
            embedding_set,
        ),
        OperatorCost(
            "norms_residual",
            zero,
            zero,
            zero + (n * 10 + 3) * hidden * width,
            zero,
            (2 * n + 1) * norm_set,
            norm_set,
        ),
        linear("qkv", spec.qkv_parameters, (Matmul(layers, tokens, hidden, qkv_width),), hidden + qkv_width),
        _cca(spec, at, width),
        _attention(spec, at, width),
        linear(
            "output", spec.output_parameters, (Matmul(layers, tokens, spec.query_size, hidden),), spec.query_size + hidden
        ),
        linear(
            "router",
            spec.router_matrix_parameters + 5 * router_width,
            router,
            hidden + 6 * router_width + 2 * (spec.num_experts + 1),
        ),
        _experts(spec, at, width, coverage),
        OperatorCost(
            "lm_head", head.flops, head.flops, np.where(at.head_rows > 0, head_bytes, 0.0), zero, head_moved, head_moved, (head,)
        ),
    )


def _cca(spec: ModelSpec, at: Shape, width: int) -> OperatorCost:
    """Both convolutions, the q/k mean residual, norm and RoPE; the state of a sequence is read and written once."""
    n, tokens, channels = spec.layers, at.tokens, spec.conv_channels
    depthwise, grouped = spec.conv_widths
    heads = sum(spec.heads)
    flops = n * tokens * 2.0 * channels * (depthwise + grouped * spec.head_dim)
    moved = tokens * 2.0 * channels * width
    state = at.batch * 2.0 * ((depthwise + grouped - 2) * channels + spec.kv_size // 2) * width
    grouped_matmul = Matmul(np.full(np.shape(tokens), float(n * heads)), tokens, spec.head_dim * grouped, spec.head_dim)
    return OperatorCost(
        "cca", flops, flops, np.full(np.shape(tokens), float(n * spec.cca_parameters * width)), n * state, n * moved, moved,
        (grouped_matmul,),
    )  # fmt: skip


def _attention(spec: ModelSpec, at: Shape, width: int) -> OperatorCost:
    """Scores and values. Every slot meets all cached keys (of the window) and, masked or not, every slot."""
    zero = np.zeros(np.shape(at.tokens))
    flops, least, kv = zero, zero, zero
    for window, layers in Counter(spec.window_by_layer).items():
        cached = at.context if window is None else np.minimum(at.context, window - 1)
        flops = flops + layers * 4.0 * spec.query_size * at.tokens * (cached + at.slots)
        least = least + layers * 4.0 * spec.query_size * at.batch * _visible(at, window)
        kv = kv + layers * 2.0 * spec.kv_size * width * at.batch * (cached + at.slots)
    moved = at.tokens * 2.0 * spec.query_size * width
    return OperatorCost("attention", flops, least, zero, kv, spec.layers * moved, moved)


def _visible(at: Shape, window: int | None) -> Array:
    """Pairs of a slot and a key it sees when all slots are causal: sum over slots i of min(context + i, window)."""
    growing = at.slots if window is None else np.clip(window - at.context, 0, at.slots)
    return growing * at.context + growing * (growing + 1) / 2 + (at.slots - growing) * (window or 0)


def _experts(spec: ModelSpec, at: Shape, width: int, coverage: ExpertCoverage) -> OperatorCost:
    """Each token through one expert (none for the skip expert); the weights of the distinct experts, each once."""
    n = spec.layers
    tokens = at.tokens * (1 - coverage.skip_share) * spec.experts_per_token
    distinct = coverage.distinct(at.batch, at.slots, spec.num_experts)
    rows = tokens / np.maximum(distinct, 1e-9)
    matmuls = expert_matmuls(spec, n * distinct, rows)
    flops = n * tokens * 2.0 * spec.expert_parameters
    moved = at.tokens * 2.0 * (spec.hidden_size + spec.expert_size) * width
    weights = n * distinct * float(spec.expert_parameters * width)
    return OperatorCost("experts", flops, flops, weights, np.zeros(np.shape(tokens)), n * moved, moved, matmuls)


def sampler_cost(spec: ModelSpec, rows: npt.ArrayLike) -> OperatorCost:
    """A step's own work over the vocabulary: `rows` rows of logits (of all sequences) read once."""
    moved = np.asarray(rows, dtype=float) * spec.vocab_size * LOGIT_BYTES
    zero = np.zeros(np.shape(moved))
    return OperatorCost("sampler", zero, zero, zero, zero, moved, moved)
