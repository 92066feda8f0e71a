"""FLOPs and bytes of one forward by operator, whatever runs it. Arrays in, arrays out.

FLOPs count multiply-adds of matmuls and convolutions twice, as `torch.utils.flop_counter` does; norms, softmax, RoPE
and activations are ignored (below 1% of a forward; their bytes are counted). What an engine adds, such as copies,
padding or launches, is `perfmodel.engine`'s. Everything is of one device, the most loaded one.

Arrays keep the shapes that they depend on, and broadcast: over a grid of batches x contexts, only attention is whole.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perfmodel.costs import Call, Matmul, OperatorCost, Shape, cost_of, gated
from perfmodel.experts import ExpertCoverage
from perfmodel.kernels.call import Array as Array
from perfmodel.kernels.call import Attention, Collective, FusedMoe
from perfmodel.model_spec import ModelSpec
from perfmodel.parallel import ALONE, Parallel, divided, most_loaded, sent_copies
from perfmodel.precision import Precision, stored_bytes

FORWARD_OPERATORS = (
    "embedding",
    "norms_residual",
    "qkv",
    "cca",
    "attention",
    "output",
    "router",
    "experts",
    "mlp",
    "collective",
    "lm_head",
)
ENGINE = "engine"  # what an engine adds to a forward or a step, whatever its kernels; named beside the operators
LOGIT_BYTES = 4  # samplers work on fp32 logits
WIRE_BYTES = 2  # activations are exchanged in 16 bits


@dataclass(frozen=True)
class _Forward:
    """What every operator's cost follows from. `spec` is one device's share, but for its number of experts."""

    spec: ModelSpec
    at: Shape  # of one replica
    precision: Precision
    coverage: ExpertCoverage
    parallel: Parallel
    everywhere: Array  # sequences of all replicas

    @property
    def width(self) -> float:
        """Bytes of an activation, and of what is never quantised."""
        return stored_bytes(self.precision.head)

    @property
    def residual(self) -> float:
        """Bytes of an element of the residual stream: ZAYA's is fp32 at any dtype."""
        return 4.0 if self.spec.architecture == "zaya" else self.width

    @property
    def linear(self) -> tuple[str, str]:
        """What linear layers multiply."""
        return self.precision.weights, self.precision.activations

    @property
    def plain(self) -> tuple[str, str]:
        """What is never quantised multiplies."""
        return self.precision.head, self.precision.head


def forward_costs(
    spec: ModelSpec,
    at: Shape,
    precision: Precision,
    coverage: ExpertCoverage,
    parallel: Parallel = ALONE,
) -> tuple[OperatorCost, ...]:
    """Costs of one forward on one device, in the order of FORWARD_OPERATORS; what the model lacks is left out.

    The prefill of T tokens is slots = T at context 0. KV is read once per sequence for all its slots, and at most the
    window of a sliding layer. Raises UserError from a measured `coverage` that does not reach the token count.
    """
    own = dataclasses.replace(at, batch=parallel.of_replica(at.batch))
    forward = _Forward(divided(spec, parallel), own, precision, coverage, parallel, at.batch)
    found = [_embedding(forward), _norms(forward), _qkv(forward)]
    if spec.convolutional:
        found.append(_cca(forward))
    found += [_attention(forward), _output(forward)]
    if spec.moe_layers:
        found += [_router(forward), _experts(forward)]
    if spec.dense_layers or spec.shared_expert_size:
        found.append(_mlp(forward))
    if parallel.devices > 1:
        found.append(_collective(forward))
    return (*found, _lm_head(forward))


def _embedding(f: _Forward) -> OperatorCost:
    hidden, tokens = f.spec.hidden_size, f.at.tokens
    return cost_of(
        "embedding",
        weight_bytes=np.minimum(tokens, f.spec.vocab_size) * hidden * f.width,
        activation_set_bytes=tokens * hidden * (f.width + f.residual),
    )


def _norms(f: _Forward) -> OperatorCost:
    """Norms and additions, in pairs: two of each in most layers.

    ZAYA scales the residual apart: a norm (residual in, dtype out), and an addition (branch and residual in, residual
    out). Others fuse an addition with the norm behind it, which saves reading the sum again.
    """
    width, pairs = f.width, f.spec.layers * f.spec.norms_per_layer / 2
    passes = 3 if f.spec.architecture == "zaya" else 2
    return cost_of(
        "norms_residual",
        repeat=pairs,
        weight_bytes=f.spec.parameters_by_component()["norms_residual"] / pairs * width,
        activation_set_bytes=2 * f.at.tokens * f.spec.hidden_size * (2 * width + passes * f.residual),
    )


def _qkv(f: _Forward) -> OperatorCost:
    spec, tokens = f.spec, f.at.tokens
    outer = spec.query_size + 2 * spec.kv_size
    return cost_of(
        "qkv",
        repeat=spec.layers,
        weight_bytes=spec.qkv_parameters * stored_bytes(f.precision.weights),
        activation_set_bytes=tokens * (spec.hidden_size + outer) * f.width,
        matmuls=(Matmul(np.asarray(float(spec.layers)), tokens, spec.hidden_size, outer),),
        dtypes=f.linear,
    )


def _output(f: _Forward) -> OperatorCost:
    spec, tokens = f.spec, f.at.tokens
    return cost_of(
        "output",
        repeat=spec.layers,
        weight_bytes=spec.output_parameters * stored_bytes(f.precision.weights),
        activation_set_bytes=tokens * (spec.query_size + spec.hidden_size) * f.width,
        matmuls=(Matmul(np.asarray(float(spec.layers)), tokens, spec.query_size, spec.hidden_size),),
        dtypes=f.linear,
    )


def _cca(f: _Forward) -> OperatorCost:
    """Both convolutions, the q/k mean residual, norm and RoPE; the state of a sequence is read and written once."""
    spec, at, n = f.spec, f.at, f.spec.layers
    tokens, channels = at.tokens, spec.conv_channels
    depthwise, grouped = spec.conv_widths
    heads = np.asarray(float(n * sum(spec.heads)))
    state = (depthwise + grouped - 2) * channels + spec.kv_size // 2
    return cost_of(
        "cca",
        repeat=n,
        weight_bytes=spec.cca_parameters * f.width,
        kv_bytes=at.batch * 2.0 * state * f.width,
        activation_set_bytes=tokens * 2.0 * channels * f.width,
        matmuls=(Matmul(heads, tokens, spec.head_dim * grouped, spec.head_dim),),
        flops=n * tokens * 2.0 * channels * (depthwise + grouped * spec.head_dim),
        dtypes=f.plain,
    )


def _attention(f: _Forward) -> OperatorCost:
    """Scores and values. Every slot meets all cached keys (of the window) and, masked or not, every slot.

    A kernel of the library reads the same keys and values once, and skips tiles of masked scores.
    """
    spec, at = f.spec, f.at
    each: float | Array = 0.0  # pairs of a slot and a key by sequence, over all layers
    least: float | Array = 0.0
    read: float | Array = 0.0
    calls: list[tuple[float, Call]] = []
    queries, keys = spec.heads
    for window, layers in Counter(spec.window_by_layer).items():
        cached = at.context if window is None else np.minimum(at.context, window - 1)
        each = each + layers * (at.slots * (cached + at.slots))
        least = least + layers * _visible(at, window)
        read = read + layers * (cached + at.slots)
        call = Attention(
            at.batch,
            at.slots,
            cached + at.slots,
            queries,
            keys,
            spec.head_dim,
            f.precision.cache,
            met=_met(at, cached, window),
        )
        calls.append((float(layers), call))
    width = stored_bytes(f.precision.cache)
    return cost_of(
        "attention",
        repeat=spec.layers,
        kv_bytes=at.batch * ((2.0 * spec.kv_size * width / spec.layers) * read),
        activation_set_bytes=at.tokens * 2.0 * spec.query_size * f.width,
        flops=at.batch * (4.0 * spec.query_size * each),
        least_flops=at.batch * (4.0 * spec.query_size * least),
        calls=tuple(calls),
        dtypes=(f.precision.cache, f.precision.cache),
    )


_MASKED_TILE = 128  # keys that a kernel masks one by one; further masked ones it does not touch (FlashAttention-2)


def _met(at: Shape, cached: Array, window: int | None) -> Array:
    """Keys that a kernel multiplies each slot with: the cached ones, and its own forward's but for skipped tiles.

    Causal slots skip half of each other, a window what lies before it. Slots that see each other in another pattern
    skip nothing.
    """
    own = at.slots if at.pairs is not None else np.minimum(at.slots, (at.slots + _MASKED_TILE) / 2)
    met = cached + own
    return met if window is None else np.minimum(met, window + np.minimum(at.slots, _MASKED_TILE))


def _visible(at: Shape, window: int | None) -> Array:
    """Pairs of a slot and a key it sees, of one sequence, at least.

    Causal slots: sum over slots i of min(context + i, window). Others, whose pairs are given: no slot comes before the
    cached tokens' end, so that in a window each sees min(context + 1, window) keys if it does not see fewer in all.
    """
    if at.pairs is not None:
        every = at.slots * at.context + at.pairs
        return every if window is None else np.minimum(every, at.slots * np.minimum(at.context + 1, window))
    growing = at.slots if window is None else np.clip(window - at.context, 0, at.slots)
    return growing * at.context + growing * (growing + 1) / 2 + (at.slots - growing) * (window or 0)


def _router(f: _Forward) -> OperatorCost:
    """ZAYA's MLP router over one class more than there are experts, or one matrix over the experts."""
    spec, tokens, n, router = f.spec, f.at.tokens, f.spec.moe_layers, f.spec.router_size
    layers = np.asarray(float(n))
    matmuls: tuple[Matmul, ...]
    if router:
        classes = spec.num_experts + 1
        inside = 6 * router + 2 * classes
        matmuls = (
            Matmul(layers, tokens, spec.hidden_size, router),
            Matmul(2 * layers, tokens, router, router),
            Matmul(layers, tokens, router, classes),
        )
    else:
        inside = 2 * spec.num_experts
        matmuls = (Matmul(layers, tokens, spec.hidden_size, spec.num_experts),)
    return cost_of(
        "router",
        repeat=n,
        weight_bytes=(spec.router_matrix_parameters + 5 * router) * f.width,
        activation_set_bytes=tokens * (spec.hidden_size + inside) * f.width,
        matmuls=matmuls,
        dtypes=f.plain,
    )


def _experts(f: _Forward) -> OperatorCost:
    """Each token through its experts (none for the skip expert); the weights of the distinct experts, each once."""
    spec, at, n, devices = f.spec, f.at, f.spec.moe_layers, f.parallel.expert
    batch = f.everywhere if f.parallel.replicas > 1 else at.batch
    hit = f.coverage.distinct(batch, at.slots, spec.num_experts, spec.experts_per_token)
    distinct = most_loaded(hit, spec.num_experts, devices)
    tokens = batch * at.slots * (1 - f.coverage.skip_share)
    rows = tokens * spec.experts_per_token / devices  # pairs of a token and an expert, on one device
    top_k = max(1.0, spec.experts_per_token / devices)
    weights, activations = f.precision.experts, f.precision.expert_activations
    call = FusedMoe(
        rows / top_k,
        spec.hidden_size,
        spec.expert_size,
        spec.num_experts // devices,
        top_k,
        distinct,
        weights,
        activations,
    )
    return cost_of(
        "experts",
        repeat=n,
        weight_bytes=distinct * float(spec.expert_parameters * stored_bytes(weights)),
        activation_set_bytes=batch
        * at.slots
        / devices
        * 2.0
        * (spec.hidden_size + spec.experts_per_token * spec.expert_size)
        * f.width,
        matmuls=expert_matmuls(spec, n * distinct, rows / np.maximum(distinct, np.finfo(float).tiny)),
        flops=n * rows * 2.0 * spec.expert_parameters,
        calls=((float(n), call),),
        dtypes=(weights, activations),
    )


def _mlp(f: _Forward) -> OperatorCost:
    """Dense MLPs, and the expert that every token takes beside its own."""
    spec, tokens = f.spec, f.at.tokens
    width = stored_bytes(f.precision.weights)
    dense, shared = float(spec.dense_layers), float(spec.moe_layers if spec.shared_expert_size else 0)
    repeat = dense + shared
    matmuls: tuple[Matmul, ...] = ()
    for layers, size in ((dense, spec.mlp_size), (shared, spec.shared_expert_size)):
        if layers:
            matmuls += gated(spec.hidden_size, size, np.asarray(layers), tokens)
    mean_size = (dense * spec.mlp_size + shared * spec.shared_expert_size) / repeat
    parameters = dense * spec.mlp_parameters + shared * spec.shared_expert_parameters
    return cost_of(
        "mlp",
        repeat=repeat,
        weight_bytes=parameters / repeat * width,
        activation_set_bytes=tokens * 2.0 * (spec.hidden_size + mean_size) * f.width,
        matmuls=matmuls,
        dtypes=f.linear,
    )


def _collective(f: _Forward) -> OperatorCost:
    """Tensor parallel: attention's and the MLP's results are summed, two all-reduces of tokens x hidden a layer.

    Replicas that share experts exchange tokens in two all-to-alls per MoE layer: every token to the other replicas'
    devices that hold its experts, in what experts multiply, and a sum of its results from each of them in 16 bits. The
    devices of a replica hold the same tokens, so that each sends a share of them.
    """
    spec, parallel, tokens = f.spec, f.parallel, f.at.tokens
    calls: list[tuple[float, Call]] = []
    size = tokens * spec.hidden_size * WIRE_BYTES
    if parallel.tensor > 1:
        calls.append((2.0 * spec.layers, Collective(size, parallel.tensor)))
    if parallel.replicas > 1:
        sent = sent_copies(spec.num_experts, spec.experts_per_token, parallel) * (1 - f.coverage.skip_share)
        # Of an exchange, a device keeps one part in as many as there are devices.
        elements = tokens * spec.hidden_size * sent / parallel.tensor * parallel.devices / (parallel.devices - 1)
        for width in (stored_bytes(f.precision.expert_activations), WIRE_BYTES):
            calls.append((float(spec.moe_layers), Collective(elements * width, parallel.devices, "all_to_all")))
    return cost_of("collective", calls=tuple(calls), repeat=sum(count for count, _ in calls), dtypes=f.plain)


def _lm_head(f: _Forward) -> OperatorCost:
    spec, at = f.spec, f.at
    rows = at.batch * at.head_rows
    parameters = spec.vocab_size * spec.hidden_size + (spec.vocab_size if spec.lm_head_bias else 0)
    passes = np.asarray(float(at.head_passes))
    cost = cost_of(
        "lm_head",
        weight_bytes=np.where(at.head_rows > 0, at.head_passes * parameters * f.width, 0.0),
        activation_set_bytes=rows * (spec.hidden_size * f.width + spec.vocab_size * LOGIT_BYTES),
        matmuls=(Matmul(passes, rows / at.head_passes, spec.hidden_size, spec.vocab_size),),
        dtypes=f.plain,
    )
    return dataclasses.replace(cost, repeat=float(at.head_passes))


def expert_matmuls(spec: ModelSpec, count: Array, rows: Array) -> tuple[Matmul, ...]:
    """Gate with up, and down, of `count` experts over all layers with `rows` tokens each."""
    return gated(spec.hidden_size, spec.expert_size, count, rows)


def sampler_cost(spec: ModelSpec, rows: npt.ArrayLike) -> OperatorCost:
    """A step's own work over the vocabulary: `rows` rows of logits (of all sequences) read once."""
    return cost_of("sampler", activation_set_bytes=np.asarray(rows, dtype=float) * spec.vocab_size * LOGIT_BYTES)


def engine_cost() -> OperatorCost:
    """What an engine spends beside its kernels: nothing that a device must compute or move."""
    return cost_of(ENGINE)
