"""The fused forward: a few operators per layer over static cache tensors, with cached lengths on the device.

It computes what `Zaya.forward` computes, in a form that native code and GPU graphs can run: no shape and no Python
decision depends on how long the sequences are. The operators are a table, `Ops`, so that reference, Triton and native
kernels serve the same forward, and so that each can be timed by wrapping its entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from hardware.files import UserError
from runtime.cache import Cache
from runtime.config import KernelConfig, LayerType, ModelConfig, require
from runtime.kernels.cca.reference import CCAWeights, cca_weights
from runtime.layout import Layout, causal, predecessors
from runtime.model.moe import RouterWeights
from runtime.model.zaya import Zaya

Scaling = tuple[Tensor, Tensor, Tensor]  # fp32 [hidden] each: constant, scale of the branch, scale of the residual


class Whole(Protocol):
    """A forward that needs no loop over the operators.

    tokens int64 [B, S]; lengths int32 [B]; active int32 [1] or None; row: the cache row of the first sequence
    -> normed hidden states [B * S, hidden], chosen experts int32 [layers, B * S].
    """

    def __call__(
        self, tokens: Tensor, layout: LayoutArrays, lengths: Tensor, active: Tensor | None, row: int
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Ops:
    """One implementation of each operator; shapes and meaning are those of the references in `runtime/kernels`.

    qkv, output and lm_head are linear layers: (x [N, in], weight [out, in], bias [out] or None) -> [N, out].
    whole: given the fused forward, returns what runs all of its operators in one call.
    """

    embed: Callable[..., Tensor]
    residual_norm: Callable[..., tuple[Tensor, Tensor]]
    qkv: Callable[..., Tensor]
    cca: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    output: Callable[..., Tensor]
    router: Callable[..., tuple[Tensor, Tensor, Tensor]]
    experts: Callable[..., Tensor]
    lm_head: Callable[..., Tensor]
    whole: Callable[[FusedForward], Whole] | None = None


# The operators by the names that predictions and measurements know them by.
OPERATORS: dict[str, str] = {
    "embed": "embedding",
    "residual_norm": "norms_residual",
    "qkv": "qkv",
    "cca": "cca",
    "attention": "attention",
    "output": "output",
    "router": "router",
    "experts": "experts",
    "lm_head": "lm_head",
}


def reference_ops() -> Ops:
    """Plain torch on any device."""
    from runtime.kernels.attention.reference import attention
    from runtime.kernels.cca.reference import cca
    from runtime.kernels.experts.reference import experts
    from runtime.kernels.residual_norm.reference import embed, residual_norm
    from runtime.kernels.router.reference import router

    return Ops(embed, residual_norm, F.linear, cca, attention, F.linear, router, experts, F.linear)


def triton_ops(config: ModelConfig, kernels: KernelConfig, device: torch.device) -> Ops:
    """The Triton kernels, with the tilings of `kernels` or the device's defaults; linear layers stay torch's."""
    from runtime.kernels.attention.kernel import attention
    from runtime.kernels.cca.kernel import cca
    from runtime.kernels.experts.kernel import experts
    from runtime.kernels.problem import Problem
    from runtime.kernels.residual_norm.kernel import embed, residual_norm
    from runtime.kernels.router.kernel import router
    from runtime.kernels.selection import default_tiling
    from runtime.kernels.target import Tiling

    @cache
    def tiling(kernel: str, batch: int, slots: int, capacity: int) -> Tiling:
        return default_tiling(kernel, device, Problem(config, batch, slots, capacity), kernels)

    def by_tokens(kernel: str, function: Callable[..., Any], place: int = 0) -> Callable[..., Any]:
        """Argument `place` has a row per token, which is all that the tiling depends on."""

        def call(*arguments: Any) -> Any:
            return function(*arguments, tiling=tiling(kernel, arguments[place].shape[0], 1, 1))

        return call

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, slots: int, *rest: Tensor | int | None
    ) -> Tensor:
        chosen = tiling("attention", lengths.shape[0], slots, keys.shape[1])
        return attention(query, keys, values, lengths, slots, *rest, tiling=chosen)  # type: ignore[arg-type]

    return Ops(
        by_tokens("embed", embed),
        by_tokens("residual_norm", residual_norm, 1),
        F.linear,
        by_tokens("cca", cca),
        attend,
        F.linear,
        by_tokens("router", router),
        by_tokens("experts", experts),
        F.linear,
    )


class LayerWeights(NamedTuple):
    """One layer's weights as the operators take them."""

    kind: LayerType  # which rotary tables it uses
    window: int | None
    qkv: Tensor  # [query + key + delayed value + current value, hidden]
    cca: CCAWeights
    output: Tensor  # [hidden, query]
    middle_scaling: Scaling  # behind attention
    middle_norm: Tensor
    router: RouterWeights
    gate_up: Tensor  # [E, 2 * width, hidden]
    down: Tensor  # [E, hidden, width]
    end_scaling: Scaling  # behind the experts
    end_norm: Tensor  # the next layer's first norm, or the final one


class ForwardWeights(NamedTuple):
    """A model's weights as the operators take them; all but a few small tensors are the model's own."""

    table: Tensor  # [vocabulary, hidden]
    bias: Tensor  # [hidden], as scale of the embedding
    scale: Tensor
    first_norm: Tensor
    layers: tuple[LayerWeights, ...]
    head: Tensor
    head_bias: Tensor | None
    eps: float


def forward_weights(model: Zaya) -> ForwardWeights:
    """Repack a frozen model. UserError for an attention bias, which the fused forward does not know."""
    config, decoder = model.config, model.model
    layers: list[LayerWeights] = []
    norms = [layer.input_layernorm.weight for layer in model.stack] + [decoder.norm.weight]
    for index, layer in enumerate(model.stack):
        attention, kind = layer.self_attn.weights(), config.layer_types[index]
        layers.append(
            LayerWeights(
                kind,
                config.sliding_window if kind == "hybrid_sliding" else None,
                attention.projection,
                cca_weights(attention, config),
                attention.output,
                layer.post_attention_residual_scale.weights(),
                layer.post_attention_layernorm.weight,
                layer.mlp.gate.weights(),
                *layer.mlp.experts.derive(),
                layer.post_mlp_residual_scale.weights(),
                norms[index + 1],
            )
        )
    return ForwardWeights(
        decoder.embed_tokens.weight,
        decoder.input_hidden_states_bias,
        decoder.input_hidden_states_scale,
        norms[0],
        tuple(layers),
        model.lm_head.weight,
        model.lm_head.bias,
        config.rms_norm_eps,
    )


class LayoutArrays(NamedTuple):
    """A layout as kernels take it: S slots."""

    slots: int
    offsets: Tensor  # int32 [S]
    taps: Tensor  # int32 [S, history + 1] into [history cached columns, S slots], oldest first
    visible: Tensor | None  # int8 [S, S]; None: causal
    committed: int


_layouts: WeakKeyDictionary[Layout, dict[int, LayoutArrays]] = WeakKeyDictionary()  # by layout and history


def layout_arrays(layout: Layout, history: int) -> LayoutArrays:
    """The arrays of a layout that all sequences share, made once."""
    known = _layouts.setdefault(layout, {})
    if history not in known:
        visible, previous = layout.visible, layout.previous
        if visible is not None:
            visible = visible.view(layout.slots, layout.slots).to(torch.int8).contiguous()
        if previous is None:
            previous = torch.arange(-1, layout.slots - 1, device=layout.offsets.device)
        taps = predecessors(previous, history).to(torch.int32).contiguous()
        offsets = layout.offsets.to(torch.int32)
        known[history] = LayoutArrays(layout.slots, offsets, taps, visible, layout.committed)
    return known[history]


def shared(layout: Layout) -> bool:
    """Whether all sequences have the same slots, as the fused forward needs it."""
    visible, previous = layout.visible, layout.previous
    return (
        layout.offsets.dim() == 1
        and (visible is None or visible.dim() == 2 or visible.shape[0] == 1)
        and (previous is None or previous.dim() == 1)
    )


class FusedForward:
    """The forward of one model over one cache. Holds the cache's tensors, not the cache."""

    def __init__(self, model: Zaya, ops: Ops, cache: Cache, *, compiled: bool = False) -> None:
        """compiled: run the layers through `torch.compile`, once for every shape of a forward."""
        self.config, self.ops = model.config, ops
        self.weights = model.packed(forward_weights)
        self.keys, self.values, self.columns = cache.keys, cache.values, cache.columns
        self.capacity, self.ring = cache.capacity, cache.ring
        table = self.weights.table
        self.rotary = {
            kind: _tables(model.rotary.factors(kind, slice(cache.capacity), cache.capacity, table.dtype, table.device))
            for kind in sorted(set(model.config.layer_types))
        }
        self._layouts: dict[Layout, LayoutArrays] = {}
        self._layer = _compiled() if compiled else run_layer
        self._whole = ops.whole(self) if ops.whole is not None else None

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        lengths: Tensor,
        *,
        active: Tensor | None = None,
        counts: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states [B, S, hidden] and chosen experts int32 [layers, B * S] of int64 tokens [B, S].

        The batch is the leading rows of the cache, lengths int32 [rows >= B] on the device their cached tokens.
        active: int32 [1], from where on tokens are padding that reads no expert. counts: the real leading slots per
        sequence of a ragged prefill; the slots behind them are left out, with hidden states of zero.
        """
        batch, slots = tokens.shape
        if counts is not None and any(n != slots for n in counts):
            return self._ragged(tokens, layout, lengths, counts)
        arrays = self._layouts.get(layout)
        if arrays is None:
            arrays = self._layouts[layout] = layout_arrays(layout, self.config.conv_history)
        hidden, routes = self._run(tokens, arrays, lengths[:batch], active, 0)
        return hidden.view(batch, slots, -1), routes

    def project(self, hidden: Tensor) -> Tensor:
        """The LM head: hidden [..., hidden] -> logits [..., V] in the model's dtype."""
        w = self.weights
        return self.ops.lm_head(hidden.reshape(-1, hidden.shape[-1]), w.head, w.head_bias).view(*hidden.shape[:-1], -1)

    def _ragged(self, tokens: Tensor, layout: Layout, lengths: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """One sequence after the other: a prompt fills a forward of its own, and padding would cost more."""
        require(
            layout.visible is None and layout.previous is None, "only causal slots can differ in number per sequence"
        )
        batch, slots = tokens.shape
        layers, device = self.config.num_hidden_layers, tokens.device
        hidden = torch.zeros(batch, slots, self.config.hidden_size, dtype=self.weights.table.dtype, device=device)
        routes = torch.full((layers, batch, slots), self.config.num_experts, dtype=torch.int32, device=device)
        for row, count in enumerate(counts):
            if count:
                arrays = layout_arrays(causal(count, str(device)), self.config.conv_history)
                part = tokens[row : row + 1, :count]
                hidden[row, :count], routes[:, row, :count] = self._run(part, arrays, lengths[row : row + 1], None, row)
        return hidden, routes.flatten(1)

    def _run(
        self, tokens: Tensor, layout: LayoutArrays, lengths: Tensor, active: Tensor | None, row: int
    ) -> tuple[Tensor, Tensor]:
        """[B * S, hidden] and [layers, B * S] of B sequences whose cache rows begin at `row`."""
        if self._whole is not None:
            return self._whole(tokens, layout, lengths, active, row)
        ops, w = self.ops, self.weights
        ids = tokens.reshape(-1).contiguous()  # a column of a wider tensor stays strided, and kernels read on
        residual = ops.embed(ids, w.table, w.bias, w.scale)
        residual, normed = ops.residual_norm(None, residual, None, w.first_norm, w.eps)
        state: Tensor | None = None
        routes = []
        for index, layer in enumerate(w.layers):
            stores = (self.keys[index], self.values[index], self.columns[index])
            if row:
                stores = tuple(store[row:] for store in stores)  # type: ignore[assignment]
            residual, normed, state, chosen = self._layer(
                ops, layer, w.eps, normed, residual, state, stores, layout, lengths, active, self.rotary[layer.kind]
            )
            routes.append(chosen)
        return normed, torch.stack(routes)


def run_layer(
    ops: Ops,
    w: LayerWeights,
    eps: float,
    normed: Tensor,
    residual: Tensor,
    state: Tensor | None,
    stores: tuple[Tensor, Tensor, Tensor],
    layout: LayoutArrays,
    lengths: Tensor,
    active: Tensor | None,
    rotary: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer: normed [N, hidden], residual fp32 [N, hidden] and router state -> those behind it, chosen [N]."""
    keys, values, columns = stores
    projected = ops.qkv(normed, w.qkv, None)
    query = ops.cca(
        projected, w.cca, keys, values, columns, lengths, layout.offsets, layout.taps, layout.committed, *rotary
    )
    attended = ops.attention(query, keys, values, lengths, layout.slots, layout.visible, layout.offsets, w.window)
    branch = ops.output(attended, w.output, None)
    residual, normed = ops.residual_norm(branch, residual, w.middle_scaling, w.middle_norm, eps)
    chosen, probability, state = ops.router(normed, state, w.router, active)
    branch = ops.experts(normed, chosen, probability, w.gate_up, w.down)
    residual, normed = ops.residual_norm(branch, residual, w.end_scaling, w.end_norm, eps)
    return residual, normed, state, chosen


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    compiled = torch.compile(run_layer, dynamic=False, fullgraph=True)

    def run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        try:
            with torch._dynamo.config.patch(recompile_limit=1000):  # one for each batch and number of slots
                return compiled(*arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # the machine's compilers are called at last
            inner = error.inner_exception
            said = f"{type(inner).__name__}: {inner}".splitlines()
            reason = next((line for line in said if "error: " in line), said[0]).strip()
            raise UserError(f"the engine compiled needs a working compiler, but compiling failed: {reason}") from error

    return run


def _tables(factors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin [P, head_dim], and the swap index."""
    cos, sin, swap = factors
    return cos.squeeze(1).contiguous(), sin.squeeze(1).contiguous(), swap


def wrap(ops: Ops, around: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Ops:
    """The table with `around(operator name, function)` in the place of every function, and no way around them."""
    return Ops(**{field: around(name, getattr(ops, field)) for field, name in OPERATORS.items()})
