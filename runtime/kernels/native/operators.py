"""Each native operator alone, with the arguments of its reference: for tests, and for timing one at a time."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hardware.files import UserError
from runtime.kernels.cca.reference import CCAWeights
from runtime.kernels.native.forward import function, put_cache, put_cca, put_layout, put_router
from runtime.kernels.native.structures import Buffers, Kept, Layer, Sizes, Step
from runtime.model.moe import RouterWeights

_P = c_void_p


def _call(name: str, dtype: torch.dtype, types: tuple[Any, ...], *arguments: Any) -> None:
    function(f"run_{name}", dtype, (c_int, *types))(torch.get_num_threads(), *arguments)


def embed(tokens: Tensor, table: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """As the reference."""
    kept, (count, hidden) = Kept(), (tokens.shape[0], table.shape[1])
    residual = torch.empty(count, hidden)
    _call(
        "embed",
        table.dtype,
        (_P, c_long, c_long, _P, _P, _P, _P),
        kept.pointer(tokens),
        count,
        hidden,
        kept.pointer(table),
        kept.pointer(bias, table.dtype),
        kept.pointer(scale, table.dtype),
        residual.data_ptr(),
    )
    return residual


def residual_norm(
    branch: Tensor | None,
    residual: Tensor,
    scaling: tuple[Tensor, Tensor, Tensor] | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As the reference; the residual is overwritten."""
    kept, (count, hidden) = Kept(), residual.shape
    normed = torch.empty(count, hidden, dtype=weight.dtype)
    residual = residual.contiguous()
    _call(
        "residual_norm",
        weight.dtype,
        (_P, _P, _P, _P, _P, _P, c_float, c_long, c_long, _P),
        kept.pointer(branch, weight.dtype),
        residual.data_ptr(),
        *(kept.pointer(part, torch.float32) for part in scaling or (None, None, None)),
        kept.pointer(weight),
        eps,
        count,
        hidden,
        normed.data_ptr(),
    )
    return residual, normed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, in], weight [out, in], bias [out] -> [N, out]. UserError where their types differ."""
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise UserError(f"a linear layer must be in one type, but got {x.dtype} and weights in {weight.dtype}")
    x = x.contiguous()
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    function("run_linear", x.dtype, (c_int, _P, c_long, _P, _P, c_long, c_long, _P))(
        torch.get_num_threads(),
        x.data_ptr(),
        x.shape[0],
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        weight.shape[0],
        weight.shape[1],
        out.data_ptr(),
    )
    return out


def cca(
    projected: Tensor,
    weights: CCAWeights,
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    taps: Tensor,
    committed: int,
    cos: Tensor,
    sin: Tensor,
    swap: Tensor,
) -> Tensor:
    """As the reference."""
    kept, layer = Kept(), Layer()
    heads, width, groups = weights.convolution.shape[0], weights.convolution.shape[2], keys.shape[2]
    sizes = Sizes(query_heads=heads - groups, kv_heads=groups, head_dim=width, history=taps.shape[1] - 1)
    step = Step(lengths.shape[0], 0, keys.shape[1], columns.shape[1] - 1, committed, 0, kept.pointer(lengths))
    put_layout(step, kept, offsets, taps, None)
    put_cca(layer, kept, weights, (cos, sin, swap), projected.dtype)
    put_cache(layer, keys, values, columns, projected.dtype)
    query = torch.empty(projected.shape[0], heads - groups, width, dtype=projected.dtype)
    structures = [ctypes.addressof(structure) for structure in (step, sizes, layer)]
    _call("cca", projected.dtype, (_P,) * 5, *structures, kept.pointer(projected), query.data_ptr())
    return query


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slots: int,
    visible: Tensor | None,
    offsets: Tensor,
    window: int | None,
) -> Tensor:
    """As the reference, but reads no more of the cache than is seen."""
    kept, layer = Kept(), Layer(window=window or 0)
    count, heads, width = query.shape
    sizes = Sizes(query_heads=heads, kv_heads=keys.shape[2], head_dim=width)
    step = Step(lengths.shape[0], slots, keys.shape[1], lengths=kept.pointer(lengths), offsets=kept.pointer(offsets))
    step.visible = kept.pointer(visible)
    put_cache(layer, keys, values, keys, query.dtype)
    out = torch.empty(count, heads * width, dtype=query.dtype)
    structures = [ctypes.addressof(structure) for structure in (step, sizes, layer)]
    _call("attention", query.dtype, (_P,) * 5, *structures, kept.pointer(query), out.data_ptr())
    return out


def router(
    x: Tensor, state: Tensor | None, weights: RouterWeights, active: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    kept, layer, count = Kept(), Layer(), x.shape[0]
    width = weights.down.shape[0]
    sizes = Sizes(hidden=x.shape[1], router=width, experts=weights.out.shape[0] - 1)
    put_router(layer, kept, weights, x.dtype)
    following = torch.empty(count, width, dtype=x.dtype)
    chosen, probability = torch.empty(count, dtype=torch.int32), torch.empty(count, dtype=x.dtype)
    _call(
        "router",
        x.dtype,
        (_P, _P, c_float, c_long, _P, _P, _P, _P, _P, _P),
        ctypes.addressof(sizes),
        ctypes.addressof(layer),
        float(weights.norm_eps),
        count,
        kept.pointer(x),
        kept.pointer(state, x.dtype),
        following.data_ptr(),
        kept.pointer(active),
        chosen.data_ptr(),
        probability.data_ptr(),
    )
    return chosen, probability, following


def experts(x: Tensor, chosen: Tensor, probability: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As the reference, but reads only the experts that are chosen."""
    kept, (count, hidden), (number, _, width) = Kept(), x.shape, down.shape
    sizes = Sizes(hidden=hidden, experts=number, width=width)
    layer = Layer(gate_up=kept.pointer(gate_up, x.dtype), down=kept.pointer(down, x.dtype))
    integers = partial(torch.empty, dtype=torch.int32)
    buffers = Buffers(
        inner=kept.pointer(torch.empty(count, width, dtype=x.dtype)),
        order=kept.pointer(integers(count)),
        first=kept.pointer(integers(number + 2)),
        hit=kept.pointer(integers(number + 1)),
    )
    out = torch.empty_like(x)
    _call(
        "experts",
        x.dtype,
        (_P, _P, _P, c_long, _P, _P, _P, _P),
        *(ctypes.addressof(structure) for structure in (sizes, layer, buffers)),
        count,
        kept.pointer(x),
        kept.pointer(chosen, torch.int32),
        kept.pointer(probability, x.dtype),
        out.data_ptr(),
    )
    return out
