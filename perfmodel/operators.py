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
    pairs: Array | None = None  # how often a slot sees a slot of its sequence, at least; None: they are causal
    head_passes: int = 1  # projections by the LM head that the rows take

    @property
    def tokens(self) -> Array:
        """Slots of all sequences: the rows of every linear layer."""
        return self.batch * self.slots


def shape(
    batch: npt.ArrayLike,
    slots: npt.ArrayLike,
    context: npt.ArrayLike,
    head_rows: npt.ArrayLike,
    pairs: Array | None = None,
    head_passes: int = 1,
) -> Shape:
    """Numbers or arrays as a `Shape`, broadcast together."""
    sequences, width, cached, rows = np.broadcast_arrays(
        *(np.asarray(a, dtype=float) for a in (batch, slots, context, head_rows))
    )
    return Shape(sequences, width, cached, rows, pairs, head_passes)


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


def _cost(
    name: str,
    like: Array,
    *,
    repeat: int = 1,
    weight_bytes: Array | float = 0.0,
    kv_bytes: Array | float = 0.0,
    activation_set_bytes: Array | float = 0.0,
    matmuls: tuple[Matmul, ...] = (),
    flops: Array | None = None,
    least_flops: Array | None = None,
) -> OperatorCost:
    """Arrays of `like`'s shape. Bytes are of one layer, done `repeat` times; FLOPs (default: the matmuls') of all."""
    zero = np.zeros(np.shape(like))
    done = sum((m.flops for m in matmuls), zero) if flops is None else zero + flops
    moved = zero + activation_set_bytes
    return OperatorCost(
        name=name,
        flops=done,
        least_flops=done if least_flops is None else zero + least_flops,
        weight_bytes=zero + repeat * weight_bytes,
        kv_bytes=zero + repeat * kv_bytes,
        activation_bytes=repeat * moved,
        activation_set_bytes=moved,
        matmuls=matmuls,
    )


def forward_costs(spec: ModelSpec, at: Shape, dtype: str, coverage: ExpertCoverage) -> tuple[OperatorCost, ...]:
    """Costs of one forward in the order of FORWARD_OPERATORS.

    The prefill of T tokens is slots = T at context 0. KV is read once per sequence for all its slots, and at most the
    window of a sliding layer. Raises UserError from a measured `coverage` that does not reach the token count.
    """
    width, n, tokens = DTYPE_BYTES[dtype], spec.layers, at.tokens
    hidden, query, router = spec.hidden_size, spec.query_size, spec.router_size
    qkv, classes = query + 2 * spec.kv_size, spec.num_experts + 1
    layers, once = np.full(np.shape(tokens), float(n)), np.ones(np.shape(tokens))
    head_tokens = at.batch * at.head_rows
    head_parameters = spec.vocab_size * hidden + (spec.vocab_size if spec.lm_head_bias else 0)
    return (
        _cost(
            "embedding",
            tokens,
            weight_bytes=np.minimum(tokens, spec.vocab_size) * hidden * width,
            activation_set_bytes=tokens * hidden * (width + RESIDUAL_BYTES),
        ),
        # Two norms (residual in, dtype out) and two additions (branch and residual in, residual out) a layer.
        _cost(
            "norms_residual",
            tokens,
            repeat=n,
            weight_bytes=(10 + 3 / n) * hidden * width,
            activation_set_bytes=2 * tokens * hidden * (2 * width + 3 * RESIDUAL_BYTES),
        ),
        _cost(
            "qkv",
            tokens,
            repeat=n,
            weight_bytes=spec.qkv_parameters * width,
            activation_set_bytes=tokens * (hidden + qkv) * width,
            matmuls=(Matmul(layers, tokens, hidden, qkv),),
        ),
        _cca(spec, at, width),
        _attention(spec, at, width),
        _cost(
            "output",
            tokens,
            repeat=n,
            weight_bytes=spec.output_parameters * width,
            activation_set_bytes=tokens * (query + hidden) * width,
            matmuls=(Matmul(layers, tokens, query, hidden),),
        ),
        _cost(
            "router",
            tokens,
            repeat=n,
            weight_bytes=(spec.router_matrix_parameters + 5 * router) * width,
            activation_set_bytes=tokens * (hidden + 6 * router + 2 * classes) * width,
            matmuls=(
                Matmul(layers, tokens, hidden, router),
                Matmul(2 * layers, tokens, router, router),
                Matmul(layers, tokens, router, classes),
            ),
        ),
        _experts(spec, at, width, coverage),
        _cost(
            "lm_head",
            tokens,
            weight_bytes=np.where(at.head_rows > 0, at.head_passes * head_parameters * width, 0.0),
            activation_set_bytes=head_tokens * (hidden * width + spec.vocab_size * LOGIT_BYTES),
            matmuls=(Matmul(at.head_passes * once, head_tokens / at.head_passes, hidden, spec.vocab_size),),
        ),
    )


def _cca(spec: ModelSpec, at: Shape, width: int) -> OperatorCost:
    """Both convolutions, the q/k mean residual, norm and RoPE; the state of a sequence is read and written once."""
    n, tokens, channels = spec.layers, at.tokens, spec.conv_channels
    depthwise, grouped = spec.conv_widths
    heads = np.full(np.shape(tokens), float(n * sum(spec.heads)))
    state = (depthwise + grouped - 2) * channels + spec.kv_size // 2
    return _cost(
        "cca",
        tokens,
        repeat=n,
        weight_bytes=spec.cca_parameters * width,
        kv_bytes=at.batch * 2.0 * state * width,
        activation_set_bytes=tokens * 2.0 * channels * width,
        matmuls=(Matmul(heads, tokens, spec.head_dim * grouped, spec.head_dim),),
        flops=n * tokens * 2.0 * channels * (depthwise + grouped * spec.head_dim),
    )


def _attention(spec: ModelSpec, at: Shape, width: int) -> OperatorCost:
    """Scores and values. Every slot meets all cached keys (of the window) and, masked or not, every slot."""
    flops, least, kv = np.zeros(()), np.zeros(()), np.zeros(())
    for window, layers in Counter(spec.window_by_layer).items():
        cached = at.context if window is None else np.minimum(at.context, window - 1)
        flops = flops + layers * 4.0 * spec.query_size * at.tokens * (cached + at.slots)
        least = least + layers * 4.0 * spec.query_size * at.batch * _visible(at, window)
        kv = kv + layers * 2.0 * spec.kv_size * width * at.batch * (cached + at.slots)
    return _cost(
        "attention",
        at.tokens,
        repeat=spec.layers,
        kv_bytes=kv / spec.layers,
        activation_set_bytes=at.tokens * 2.0 * spec.query_size * width,
        flops=flops,
        least_flops=least,
    )


def _visible(at: Shape, window: int | None) -> Array:
    """Pairs of a slot and a key it sees, at least.

    Causal slots: sum over slots i of min(context + i, window). Others, whose pairs are given: no slot comes before the
    cached tokens' end, so that in a window each sees min(context + 1, window) keys if it does not see fewer in all.
    """
    if at.pairs is not None:
        every = at.slots * at.context + at.pairs
        return every if window is None else np.minimum(every, at.slots * np.minimum(at.context + 1, window))
    growing = at.slots if window is None else np.clip(window - at.context, 0, at.slots)
    return growing * at.context + growing * (growing + 1) / 2 + (at.slots - growing) * (window or 0)


def _experts(spec: ModelSpec, at: Shape, width: int, coverage: ExpertCoverage) -> OperatorCost:
    """Each token through one expert (none for the skip expert); the weights of the distinct experts, each once."""
    n = spec.layers
    tokens = at.tokens * (1 - coverage.skip_share) * spec.experts_per_token
    distinct = coverage.distinct(at.batch, at.slots, spec.num_experts)
    return _cost(
        "experts",
        tokens,
        repeat=n,
        weight_bytes=distinct * float(spec.expert_parameters * width),
        activation_set_bytes=at.tokens * 2.0 * (spec.hidden_size + spec.expert_size) * width,
        matmuls=expert_matmuls(spec, n * distinct, tokens / np.maximum(distinct, np.finfo(float).tiny)),
        flops=n * tokens * 2.0 * spec.expert_parameters,
    )


def sampler_cost(spec: ModelSpec, rows: npt.ArrayLike) -> OperatorCost:
    """A step's own work over the vocabulary: `rows` rows of logits (of all sequences) read once."""
    logits = np.asarray(rows, dtype=float) * spec.vocab_size * LOGIT_BYTES
    return _cost("sampler", logits, activation_set_bytes=logits)
