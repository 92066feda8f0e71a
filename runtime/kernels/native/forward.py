"""A whole fused forward in one native call."""

from __future__ import annotations

import ctypes
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hardware.files import UserError
from runtime.config import ModelConfig, require
from runtime.kernels.cca.reference import CCAWeights
from runtime.kernels.native import library
from runtime.kernels.native.structures import OPERATOR_NAMES, SUFFIXES, Buffers, Kept, Layer, Model, Sizes, Step
from runtime.model.moe import RouterWeights

if TYPE_CHECKING:  # which takes this module's forward
    from runtime.fused import FusedForward, LayoutArrays

_FORWARD = (ctypes.c_int, *[ctypes.c_void_p] * 7)  # threads, model, step, buffers, tokens, hidden, routes, nanoseconds


@cache
def function(name: str, dtype: torch.dtype, arguments: tuple[Any, ...] = _FORWARD) -> Any:
    """The library's function for this type. UserError for another type, and where the library cannot be built."""
    require(dtype in SUFFIXES, f"native kernels compute in float32 or bfloat16, but got {dtype}")
    found = getattr(library.load(), f"{name}_{SUFFIXES[dtype]}")
    found.argtypes, found.restype = arguments, ctypes.c_int
    return found


def put_cca(
    layer: Layer, kept: Kept, weights: CCAWeights, rotary: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    """Point a layer to the weights of CCA and to its rotary tables."""
    layer.convolution = kept.pointer(weights.convolution, dtype)
    layer.convolution_bias = kept.pointer(weights.convolution_bias, dtype)
    layer.temperature = kept.pointer(weights.temperature, torch.float32)
    cos, sin, swap = rotary
    layer.cos, layer.sin = kept.pointer(cos, dtype), kept.pointer(sin, dtype)
    layer.swap = kept.pointer(swap, torch.int64)


def put_router(layer: Layer, kept: Kept, weights: RouterWeights, dtype: torch.dtype) -> None:
    """Point a layer to the weights of its router."""
    w = weights
    layer.router, layer.router_bias = kept.pointer(w.down, dtype), kept.pointer(w.down_bias, dtype)
    layer.state_scale, layer.router_norm = kept.pointer(w.state_scale, dtype), kept.pointer(w.norm, dtype)
    layer.fc1, layer.fc1_bias = kept.pointer(w.fc1, dtype), kept.pointer(w.fc1_bias, dtype)
    layer.fc2, layer.fc2_bias = kept.pointer(w.fc2, dtype), kept.pointer(w.fc2_bias, dtype)
    layer.classes, layer.balancing = kept.pointer(w.out, dtype), kept.pointer(w.balancing, torch.float32)


def put_cache(layer: Layer, keys: Tensor, values: Tensor, columns: Tensor, dtype: torch.dtype) -> None:
    """Point a layer to its part of the cache, whose tensors must outlive it. UserError for one of another type."""
    if not keys.dtype == values.dtype == columns.dtype == dtype:
        raise UserError(f"the cache must be in {dtype} as the model, but is in {keys.dtype}")
    layer.keys, layer.values, layer.columns = keys.data_ptr(), values.data_ptr(), columns.data_ptr()


def put_layout(step: Step, kept: Kept, offsets: Tensor, taps: Tensor, visible: Tensor | None) -> None:
    """Point a step to how its slots lie."""
    step.slots = offsets.shape[0]
    step.offsets, step.taps = kept.pointer(offsets, torch.int32), kept.pointer(taps, torch.int32)
    step.visible = kept.pointer(visible, torch.int8)


def sizes_of(config: ModelConfig) -> Sizes:
    """A model's dimensions."""
    return Sizes(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.num_experts,
        config.moe_intermediate_size,
        config.router_hidden_size,
        config.conv_history,
        config.vocab_size,
    )


def make_buffers(config: ModelConfig, tokens: int, dtype: torch.dtype, kept: Kept) -> Buffers:
    """Memory for forwards of up to so many tokens."""
    query = config.query_size
    widths: dict[str, int] = {
        "normed": config.hidden_size,
        "branch": config.hidden_size,
        "projected": query + 2 * config.kv_size,
        "query": query,
        "attended": query,
        "state": config.router_hidden_size,
        "other_state": config.router_hidden_size,
        "inner": config.moe_intermediate_size,
        "share": 1,
    }
    made = Buffers(residual=kept.pointer(torch.empty(tokens * config.hidden_size)))
    for name, width in widths.items():
        setattr(made, name, kept.pointer(torch.empty(tokens * width, dtype=dtype)))
    for name, count in {"order": tokens, "first": config.num_experts + 2, "hit": config.num_experts + 1}.items():
        setattr(made, name, kept.pointer(torch.empty(count, dtype=torch.int32)))
    return made


def products_per_token(config: ModelConfig) -> int:
    """Multiplications of a token with weights, the LM head's left out."""
    heads, width = config.num_attention_heads + config.num_key_value_heads, config.router_hidden_size
    linear = config.hidden_size * (2 * config.query_size + 2 * config.kv_size + width)
    convolution = heads * config.head_dim**2 * (config.conv_history + 1)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return config.num_hidden_layers * (linear + convolution + expert + 2 * width * width)


class NativeForward:
    """All layers of `FusedForward` in one call, over the same cache. Not for two threads at once."""

    def __init__(self, fused: FusedForward) -> None:
        """UserError where the library cannot be built."""
        # The cache's tensors are held, but not `fused`, which holds this: a circle would keep them all for long.
        self._config, self._cache = fused.config, (fused.keys, fused.values, fused.columns)
        self._capacity, self._ring = fused.capacity, fused.ring
        weights = fused.weights
        self._dtype = weights.table.dtype
        self._function = function("forward", self._dtype)
        self._kept = Kept()
        point = partial(self._kept.pointer, dtype=self._dtype)
        layers = (Layer * len(weights.layers))()
        for index, (layer, w) in enumerate(zip(layers, weights.layers, strict=True)):
            layer.qkv, layer.output = point(w.qkv), point(w.output)
            layer.gate_up, layer.down = point(w.gate_up), point(w.down)
            layer.middle_norm, layer.end_norm = point(w.middle_norm), point(w.end_norm)
            for place in range(3):
                layer.middle_scaling[place] = point(w.middle_scaling[place], dtype=torch.float32)
                layer.end_scaling[place] = point(w.end_scaling[place], dtype=torch.float32)
            layer.window = w.window or 0
            put_cca(layer, self._kept, w.cca, fused.rotary[w.kind], self._dtype)
            put_router(layer, self._kept, w.router, self._dtype)
            put_cache(layer, fused.keys[index], fused.values[index], fused.columns[index], self._dtype)
        self._layers = layers
        self._model = Model(
            sizes_of(fused.config),
            len(layers),
            products_per_token(fused.config),
            layers,
            *(point(tensor) for tensor in (weights.table, weights.bias, weights.scale, weights.first_norm)),
            weights.eps,
            float(weights.layers[0].router.norm_eps),
        )
        # The memory itself is held: a parameter gets another one when the model changes its type.
        self._kept.tensors = [tensor.detach() for tensor in self._kept.tensors]
        self._room, self._memory = 0, Kept()
        self._buffers = Buffers()
        self._steps: dict[tuple[int | None, ...], tuple[Step, Kept, LayoutArrays]] = {}
        self._times: torch.Tensor | None = None

    def __call__(
        self, tokens: Tensor, layout: LayoutArrays, lengths: Tensor, active: Tensor | None, row: int
    ) -> tuple[Tensor, Tensor]:
        """As `runtime.fused.Whole`. IndexError for unknown tokens and for slots that do not fit the cache."""
        batch, slots = tokens.shape
        count = batch * slots
        if count > self._room:
            self._room = max(64, 1 << (count - 1).bit_length())
            self._memory = Kept()
            self._buffers = make_buffers(self._config, self._room, self._dtype, self._memory)
        step = self._step(batch, layout, lengths, active, row)
        tokens = tokens.contiguous()
        hidden = torch.empty(count, self._config.hidden_size, dtype=self._dtype)
        routes = torch.empty(len(self._layers), count, dtype=torch.int32)
        failed = self._function(
            torch.get_num_threads(),
            ctypes.addressof(self._model),
            ctypes.addressof(step),
            ctypes.addressof(self._buffers),
            tokens.data_ptr(),
            hidden.data_ptr(),
            routes.data_ptr(),
            None if self._times is None else self._times.data_ptr(),
        )
        if failed:
            what = "tokens must be known" if failed == 1 else "slots must fit the cache"
            raise IndexError(f"{what}, but got {tokens.tolist()} behind lengths {lengths.tolist()}")
        return hidden, routes

    def times(self, wanted: bool = True) -> dict[str, float]:
        """The seconds of each operator since the last call; from here on they are counted, or not."""
        counted = [] if self._times is None else self._times.tolist()
        self._times = torch.zeros(len(OPERATOR_NAMES), dtype=torch.int64) if wanted else None
        return {name: ns * 1e-9 for name, ns in zip(OPERATOR_NAMES, counted, strict=False)}

    def _step(self, batch: int, layout: LayoutArrays, lengths: Tensor, active: Tensor | None, row: int) -> Step:
        """Made once for a layout and a place in the cache."""
        padding = None if active is None else active.data_ptr()
        key = (id(layout), batch, lengths.data_ptr(), padding, row)
        found = self._steps.get(key)
        if found is None:
            if len(self._steps) >= 1024:  # every prompt length is a layout
                self._steps.clear()
            kept = Kept()
            step = Step(batch, 0, self._capacity, self._ring, layout.committed, row, lengths.data_ptr())
            step.active = padding
            put_layout(step, kept, layout.offsets, layout.taps, layout.visible)
            found = self._steps[key] = (step, kept, layout)
        return found[0]
