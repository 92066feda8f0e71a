"""The experts in plain torch: the same operator as `experts`, and the same reference."""

from __future__ import annotations

from runtime.kernels.experts.reference import experts as grouped_experts

__all__ = ["grouped_experts"]
