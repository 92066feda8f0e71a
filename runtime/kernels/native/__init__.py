"""The operators of the fused forward in C, for CPUs: compiled on first use, for fp32 and bf16."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from hardware.files import UserError

if TYPE_CHECKING:
    from runtime.fused import Ops


@lru_cache(maxsize=1)
def obstacle() -> str | None:
    """Why the library cannot be had here, in one line; None when it can. Compiles it the first time."""
    from runtime.kernels.native.library import load

    try:
        load()
    except UserError as error:
        return str(error)
    return None


def native_ops() -> Ops:
    """The native operators, and a forward of all of them in one call. UserError where they cannot be compiled."""
    from runtime.fused import Ops
    from runtime.kernels.native import operators
    from runtime.kernels.native.forward import NativeForward
    from runtime.kernels.native.library import load

    load()
    linear = operators.linear
    return Ops(
        operators.embed,
        operators.residual_norm,
        linear,
        operators.cca,
        operators.attention,
        linear,
        operators.router,
        operators.experts,
        linear,
        NativeForward,
    )
