"""Kernels against their references: every one in Triton's interpreter, and the comparison itself on made-up kernels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from runtime.kernels import check
from runtime.kernels.check import CheckResult, Subject, clone, relative_error, tensors
from runtime.kernels.problem import ODD_PROBLEMS
from runtime.kernels.registry import KERNELS, Kernel
from runtime.kernels.target import Target, Tiling
from tests.interpreter import interpreted


def command(*arguments: str) -> tuple[int, str]:
    """The exit code and output of runtime.kernels.check, for a process that has loaded triton to interpret."""
    check.prepare = lambda device: None
    with redirect_stdout(StringIO()) as output:
        return check.main(list(arguments)), output.getvalue()


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_its_reference_in_the_interpreter(name: str) -> None:
    code, output = interpreted(__name__, "command", "--kernel", name, "--json")
    document = json.loads(output)
    assert code == bool(document["failed"])
    assert [result for result in document["results"] if not result["passed"]] == []
    tried = {(result["problem"], result["dtype"]) for result in document["results"]}
    assert tried == {(str(problem), dtype) for problem in ODD_PROBLEMS for dtype in ("float32", "float16")}
    assert all(result["errors"] for result in document["results"])


@pytest.mark.parametrize(("function", "said"), [("wrong", "AssertionError: as it must be"), ("dead", "code -6")])
def test_what_fails_there_fails_here(function: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        interpreted(__name__, function)


def wrong() -> None:
    raise AssertionError("as it must be")


def dead() -> None:
    os.abort()


class Pair(NamedTuple):
    scale: Tensor
    shift: Tensor


def affine(x: Tensor, weights: Pair, cache: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
    """A reference: x * scale + shift and its argmax; x goes into row 3 of the cache, and `work` is scribbled on."""
    cache[3] = x
    y = x * weights.scale + weights.shift
    return y, y.argmax().to(torch.int32)


@dataclass(frozen=True)
class MadeUp(Kernel):
    """A kernel whose parts are given here instead of in a folder."""

    wrong: Callable[..., Any] = affine
    judge: Callable[..., dict[str, float]] | None = None

    def reference(self) -> Callable[..., Any]:
        return affine

    def triton(self) -> Callable[..., Any]:
        return lambda *, tiling, **arguments: self.wrong(**arguments)

    def tilings(self, target: Target, problem: Any) -> tuple[Tiling, ...]:
        return ({"BLOCK": 16},)

    def inputs(self, problem: Any, dtype: Any, device: Any, seed: int = 0) -> dict[str, Any]:
        torch.manual_seed(seed)
        x = torch.randn(64, dtype=dtype)
        pair = Pair(torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype))
        return {"x": x, "weights": pair, "cache": torch.randn(1000, 64, dtype=dtype), "work": torch.zeros(4)}

    def output_names(self) -> tuple[str, ...]:
        return ("y", "best")

    def errors(self, arguments: dict[str, Any], expected: Any, found: Any) -> dict[str, float]:
        return self.judge(arguments, expected, found) if self.judge else {}


def checked(wrong: Callable[..., Any] = affine, **settings: Any) -> CheckResult:
    kernel = MadeUp("made-up", "none", wrong=wrong, **settings)
    return Subject(kernel, ODD_PROBLEMS[0], "float32", "cpu").check({"BLOCK": 16})


def test_a_right_kernel_passes() -> None:
    result = checked()
    assert result.passed
    assert dict(result.errors) == {"y": 0.0, "best": 0.0, "cache": 0.0}  # not the arguments that nobody changed


def test_a_wrong_output_is_found() -> None:
    def wrong(**given: Any) -> Any:
        y, best = affine(**given)
        y[5] += 1e-2
        return y, best

    result = checked(wrong)
    assert not result.passed
    assert result.errors["y"] > result.tolerance
    assert result.errors["cache"] == 0


def test_an_error_in_a_large_cache_is_not_diluted() -> None:
    """One value of 64,000 is off by a thousandth of itself; of what was written that is too much."""

    def wrong(**given: Any) -> Any:
        found = affine(**given)
        given["cache"][3, 7] *= 1.001
        return found

    assert checked(wrong).errors["cache"] > 1e-5
    assert not checked(wrong).passed


def test_a_write_beside_the_expected_place_is_found() -> None:
    def wrong(**given: Any) -> Any:
        given["cache"][999, 63] = 0
        return affine(**given)

    assert not checked(wrong).passed


def test_a_scratch_argument_may_be_overwritten() -> None:
    def scribbles(**given: Any) -> Any:
        given["work"] += 1
        return affine(**given)

    assert not checked(scribbles).passed
    assert checked(scribbles, scratch=("work",)).passed


def test_integers_are_equal_or_judged_by_the_kernel() -> None:
    def wrong(**given: Any) -> Any:
        y, best = affine(**given)
        return y, best + 1

    assert checked(wrong).errors["best"] == 1
    assert not checked(wrong).passed
    assert checked(wrong, judge=lambda arguments, expected, found: {"best": 0.0}).passed


@pytest.mark.parametrize(("name", "unfit"), [("OutOfResources", True), ("RuntimeError", False)])
def test_what_a_kernel_raises_is_its_outcome(name: str, unfit: bool) -> None:
    """A tiling that the device refuses is no failure, any other error is."""

    def wrong(**given: Any) -> Any:
        raise type(name, (Exception,), {})("out of it")

    result = checked(wrong)
    assert "out of it" in result.outcome
    assert (result.unfit, result.passed) == (unfit, unfit)


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0, float("inf")], [1.0, 2.0], float("inf")),
        ([1.0, -float("inf")], [1.0, -float("inf")], 0.0),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-9], [0.0, 0.0], float("inf")),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
    ],
)
def test_relative_error(found: list[float], expected: list[float], error: float) -> None:
    assert relative_error(torch.tensor(found), torch.tensor(expected)) == pytest.approx(error)


def test_another_shape_or_type_is_an_error() -> None:
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(2, dtype=torch.float16)) == float("inf")


def test_copies_share_memory_and_strides_as_the_originals_do() -> None:
    whole = torch.arange(24.0).view(4, 6)
    given = {"whole": whole, "weights": Pair(whole[1:, ::2], torch.ones(2)), "same": [whole.T], "none": None}
    copied = clone(given)
    before, after = dict(tensors(given)), dict(tensors(copied))
    assert list(before) == list(after) == ["whole", "weights.scale", "weights.shift", "same.0"]
    assert all(before[name].stride() == after[name].stride() for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    copied["whole"][1, 2] = -1
    assert copied["weights"].scale[0, 1] == -1
    assert copied["same"][0][2, 1] == -1
    assert whole[1, 2] == 8
