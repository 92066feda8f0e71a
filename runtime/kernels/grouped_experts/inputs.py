"""Arguments of the experts: those of `experts`."""

from __future__ import annotations

from runtime.kernels.experts.inputs import inputs

__all__ = ["inputs"]
