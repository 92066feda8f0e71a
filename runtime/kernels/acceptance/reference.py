"""Drawing and judging in plain torch: the samplers' own functions."""

from runtime.samplers.acceptance import Accepted, Draft, draw, verify

__all__ = ["Accepted", "Draft", "draw", "verify"]
