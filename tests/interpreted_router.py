"""The router's kernel in Triton's interpreter, where its inputs are rare ones. See tests/interpreter.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from runtime.config import ModelConfig
from runtime.kernels.check import clone
from runtime.kernels.problem import Problem
from runtime.kernels.router.inputs import inputs
from runtime.kernels.router.kernel import router
from runtime.kernels.router.reference import router as reference
from runtime.kernels.router.tilings import tilings
from runtime.kernels.target import TARGETS

CONFIG = ModelConfig(hidden_size=72, num_experts=5, router_hidden_size=40, num_hidden_layers=2)
TOLERANCE = 1e-5


def compare(name: str, tokens: int, change: Callable[[dict[str, Any]], None], target: str = "sm_90") -> None:
    """The kernel against its reference on inputs that `change` has changed."""
    problem = Problem(CONFIG, batch=tokens)
    given = inputs(problem, torch.float32, "cpu", seed=3)
    change(given)
    expected = reference(**clone(given))
    found = router(**clone(given), tiling=tilings(TARGETS[target], problem)[0])
    assert torch.equal(found[0], expected[0]), f"{name}: {found[0]} instead of {expected[0]}"
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True, msg=name)


def first_layer(given: dict[str, Any]) -> None:
    given["state"], given["weights"] = None, given["weights"]._replace(state_scale=None)


def no_padding(given: dict[str, Any]) -> None:
    given["active"] = None


def nothing_active(given: dict[str, Any]) -> None:
    given["active"].zero_()


def all_alike(given: dict[str, Any]) -> None:
    """No output differs from another: the first class is chosen, as torch does."""
    given["active"] = None
    given["weights"].out.zero_()
    given["weights"].balancing.zero_()


def not_a_number(given: dict[str, Any]) -> None:
    """One token is NaN: it gets an expert that exists, and no other token is touched."""
    given["active"] = None
    given["x"][2] = float("nan")


def half_a_number(given: dict[str, Any]) -> None:
    """One bias is NaN: that class counts as the largest."""
    given["active"] = None
    given["weights"].balancing[3] = float("nan")


def rare_cases() -> None:
    for size in (18, 1):  # a launch finds the counters as the one before it left them
        compare("first layer", size, first_layer)
    compare("no padding", 18, no_padding, "gfx942")
    compare("nothing active", 5, nothing_active)
    compare("ties", 5, all_alike)
    compare("NaN", 5, not_a_number)
    compare("a NaN bias", 5, half_a_number)
