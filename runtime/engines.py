"""Which engine runs a model's forwards: chosen once, then followed by every forward over a cache.

Forwards without a cache, and those that train, are always eager ones. So are, whatever the engine, layouts that differ
per sequence, and on a GPU the prefill, whose operators are large enough for plain torch.
"""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardware.files import UserError, known
from runtime.cache import Cache
from runtime.config import ENGINES, Engine, KernelConfig, replace, require
from runtime.fused import ForwardWeights, FusedForward, Ops, forward_weights, reference_ops, shared, triton_ops
from runtime.layout import Layout
from runtime.model.zaya import Zaya
from runtime.samplers.acceptance import Plain, Sampling

CPP_COMPILERS = (os.environ.get("CXX") or "g++", "clang++")  # what torch.compile calls on a CPU


def obstacle(model: Zaya, engine: Engine) -> str | None:
    """Why this engine cannot run this model where it is, in one line; None when it can."""
    found = _unsuited(model, engine)
    if found is not None or engine == "eager":
        return found
    if engine == "graphs":
        return None if _has_triton() else "the engine graphs needs triton, which is not installed"
    if engine == "lean":
        return _native_obstacle()
    device = model.model.embed_tokens.weight.device
    if device.type == "cpu" and not any(map(shutil.which, CPP_COMPILERS)):
        return f"the engine compiled needs a C++ compiler: none of {', '.join(CPP_COMPILERS)} was found"
    return None


def _unsuited(model: Zaya, engine: Engine) -> str | None:
    """Why it could not run this model there, whatever is installed."""
    weight = model.model.embed_tokens.weight
    device, dtype = weight.device, str(weight.dtype).removeprefix("torch.")
    if engine == "eager":
        return None
    if model.config.attention_bias:
        return f"the engine {engine} runs models without attention_bias: use eager"
    if engine == "graphs" and device.type != "cuda":
        return f"the engine graphs runs on a GPU, but the model is on {device}"
    if engine == "lean":
        if device.type != "cpu":
            return f"the engine lean runs on a CPU, but the model is on {device}"
        if dtype not in ("float32", "bfloat16"):
            return f"the engine lean computes in float32 or bfloat16, but the model is in {dtype}"
    return None


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _native_obstacle() -> str | None:
    from runtime.kernels import native

    return native.obstacle()


def engine_of(model: Zaya, name: str = "auto") -> Engine:
    """The engine of this name; auto: the fastest that can run this model where it is. UserError for one that cannot."""
    if name == "auto":
        return next(engine for engine in ("graphs", "lean", "eager") if obstacle(model, engine) is None)
    if name not in ENGINES:
        raise known("engine", name, ("auto", *ENGINES))
    reason = obstacle(model, name)
    if reason is not None:
        raise UserError(reason)
    return name


def unbuilt(model: Zaya) -> str | None:
    """Why auto passed over lean although it could run this model: what compiling it lacks; None where it did not."""
    return None if _unsuited(model, "lean") else _native_obstacle()


def use_engine(model: Zaya, name: str = "auto") -> Zaya:
    """Let this engine run the model's forwards from here on. Returns the model."""
    model.kernels = replace(model.kernels, engine=engine_of(model, name))
    return model


def operators(model: Zaya, kernels: KernelConfig) -> Ops:
    """The operators of an engine's fused forward."""
    if kernels.engine == "lean":
        from runtime.kernels.native import native_ops

        return native_ops()
    if kernels.engine == "graphs":
        return triton_ops(model.config, kernels, model.model.embed_tokens.weight.device)
    return reference_ops()


def sampling_of(model: Zaya) -> Sampling:
    """What draws and judges in a step that is captured: kernels on a GPU, else plain torch."""
    device = model.model.embed_tokens.weight.device
    if device.type != "cuda":
        return Plain()
    from runtime.kernels.acceptance.kernel import Kernels
    from runtime.kernels.problem import Problem
    from runtime.kernels.selection import Selection

    select, config = Selection(device, model.kernels), model.config  # graphs keep these, and must not keep the model
    return Kernels(lambda kernel, batch, slots: select(kernel, Problem(config, batch, slots)))


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Within it a GPU is torch's current one, on which Triton and graphs work, whatever thread runs it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass
class Bound:
    """What an engine keeps of a cache: the forward over its tensors, for these weights and settings."""

    kernels: KernelConfig
    weights: ForwardWeights
    forward: FusedForward
    graphs: Any = None  # of `runtime.graphs`


def bound(model: Zaya, cache: Cache) -> Bound:
    """The engine's forward over this cache, made when the weights or the settings are new."""
    kernels, weights = model.kernels, model.packed(forward_weights)
    found: Bound | None = cache.bound
    if found is not None and found.weights is weights:
        if found.kernels is kernels:
            return found
        if (found.kernels.engine, found.kernels.tilings) == (kernels.engine, kernels.tilings):
            found.kernels = kernels
            return found
    made = FusedForward(model, operators(model, kernels), cache, compiled=kernels.engine == "compiled")
    cache.bound = Bound(kernels, weights, made)
    return cache.bound


def serves(model: Zaya, layout: Layout, cache: Cache, counts: list[int] | None) -> bool:
    """Whether the model's engine runs such a forward, or leaves it to the eager one."""
    if not shared(layout) or (counts is not None and (layout.visible is not None or layout.previous is not None)):
        return False
    if model.kernels.engine == "lean":
        return True
    # One launch reads a ring that it also writes, and a shape of its own would be compiled for every prompt.
    return counts is None and layout.committed <= cache.ring - model.config.conv_history


def run(
    model: Zaya, tokens: Tensor, layout: Layout, cache: Cache, counts: list[int] | None
) -> tuple[Tensor, Tensor] | None:
    """`Zaya.run` by the model's engine: hidden states and routes, or None where it leaves that to the eager forward."""
    if not serves(model, layout, cache, counts):
        return None
    batch, slots = tokens.shape
    require(cache.batch == batch, f"the cache holds {cache.batch} sequences, but got {batch}")
    total = max(cache.lengths) + slots
    require(total <= cache.capacity, f"{total} positions do not fit the cache of {cache.capacity}")
    if layout.committed:
        cache.wrote(counts or [layout.committed] * batch)
    forward = bound(model, cache).forward
    with on_device(tokens.device):
        return forward.forward(tokens, layout, cache.device_lengths(), counts=counts)


def project(model: Zaya, hidden: Tensor) -> Tensor:
    """`Zaya.project` by the native kernels: hidden [..., hidden] -> float32 logits [..., V]."""
    from runtime.kernels.native.operators import linear

    weights = model.packed(forward_weights)
    flat = linear(hidden.reshape(-1, hidden.shape[-1]), weights.head, weights.head_bias)
    return flat.view(*hidden.shape[:-1], -1).float()
