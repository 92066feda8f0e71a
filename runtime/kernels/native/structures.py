"""The structures of structures.h, field by field, and how tensors become pointers."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
OPERATOR_NAMES = ("embedding", "norms_residual", "qkv", "cca", "attention", "output", "router", "experts")


class Sizes(ctypes.Structure):
    """A model's dimensions."""

    _fields_ = [
        (name, c_int64)
        for name in "hidden query_heads kv_heads head_dim experts width router history vocabulary".split()
    ]


class Step(ctypes.Structure):
    """One forward."""

    _fields_ = [
        *((name, c_int64) for name in "batch slots capacity ring committed row".split()),
        *((name, c_void_p) for name in "lengths offsets taps visible active".split()),
    ]


class Layer(ctypes.Structure):
    """One layer's weights and its part of the cache."""

    _fields_ = [
        *((name, c_void_p) for name in "qkv convolution convolution_bias output temperature cos sin swap".split()),
        ("middle_scaling", c_void_p * 3),
        ("middle_norm", c_void_p),
        ("end_scaling", c_void_p * 3),
        ("end_norm", c_void_p),
        *((name, c_void_p) for name in "router router_bias state_scale router_norm fc1 fc1_bias fc2 fc2_bias".split()),
        *((name, c_void_p) for name in "classes balancing gate_up down keys values columns".split()),
        ("window", c_int64),
    ]


class Model(ctypes.Structure):
    """A model: its layers and what stands before them."""

    _fields_ = [
        ("sizes", Sizes),
        ("layers", c_int64),
        ("products", c_int64),
        ("layer", ctypes.POINTER(Layer)),
        *((name, c_void_p) for name in "table bias scale first_norm".split()),
        ("eps", c_float),
        ("router_eps", c_float),
    ]


class Buffers(ctypes.Structure):
    """What one operator leaves to the next."""

    _fields_ = [
        (name, c_void_p)
        for name in (
            "residual normed branch projected query attended state other_state inner share order first hit".split()
        )
    ]


class Kept:
    """Pointers into tensors, which live as long as this does."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def pointer(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        """The address of a contiguous tensor of this type: of the given one, or of a copy where it is neither."""
        if tensor is None:
            return None
        if (dtype is not None and tensor.dtype != dtype) or not tensor.is_contiguous():
            tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
        self.tensors.append(tensor)
        return tensor.data_ptr()
