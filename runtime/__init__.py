"""The runtime: the ZAYA model, its cache, samplers and conversion. Public names load torch only when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.batching import Batcher, Request
    from runtime.checkpoint import load_model
    from runtime.engine import GenerationResult, generate

__all__ = ["Batcher", "GenerationResult", "Request", "generate", "load_model"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    homes = {
        "Batcher": "runtime.batching",
        "GenerationResult": "runtime.engine",
        "Request": "runtime.batching",
        "generate": "runtime.engine",
        "load_model": "runtime.checkpoint",
    }
    if name not in homes:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)
