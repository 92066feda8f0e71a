"""The router as a function against the module, how a kernel's choices are judged, and what the kernel relies on."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from runtime.config import ModelConfig
from runtime.kernels.compiler import USABLE, Job, compile_one, launches, specialise
from runtime.kernels.problem import Problem
from runtime.kernels.registry import kernel
from runtime.kernels.router.inputs import errors, inputs
from runtime.kernels.router.reference import router
from runtime.kernels.router.tilings import tilings
from runtime.kernels.target import TARGETS, Target
from runtime.model.moe import Router
from tests.interpreter import interpreted

CONFIG = ModelConfig(hidden_size=72, num_experts=5, router_hidden_size=24, num_hidden_layers=2)
PROBLEM = Problem(CONFIG, batch=9)


def module(layer: int, dtype: torch.dtype) -> Router:
    torch.manual_seed(layer)
    found = Router(CONFIG, layer)
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.4 if parameter.dim() == 2 else 0.1)
    nn.init.normal_(found.router_mlp.norm.weight, mean=1.0, std=0.2)
    found.balancing_biases = torch.randn(6) * 0.05
    return found.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_the_function_is_the_module(layer: int, dtype: torch.dtype) -> None:
    given = module(layer, dtype)
    x = torch.randn(40, CONFIG.hidden_size).to(dtype)
    state = torch.randn(40, CONFIG.router_hidden_size).to(dtype) if layer else None
    expected, found = given.forward(x, state), router(x, state, given.weights(), None)
    assert found[0].dtype == torch.int32
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
    assert len(found[0].unique()) > 2


def test_padding_is_skipped_and_changes_nothing_else() -> None:
    given = inputs(PROBLEM, torch.float32, "cpu")
    padded = router(**given)
    whole = router(**{**given, "active": None})
    real = int(given["active"])
    assert 0 < real < PROBLEM.tokens
    assert torch.equal(padded[0][:real], whole[0][:real])
    assert (padded[0][real:] == CONFIG.num_experts).all() and (whole[0][real:] != CONFIG.num_experts).any()
    assert torch.equal(padded[2], whole[2])


class TestJudgement:
    """A kernel may choose another expert only where rounding could have."""

    def test_the_reference_is_faultless(self) -> None:
        given = inputs(PROBLEM, torch.float32, "cpu")
        found = router(**given)
        assert errors(given, found, found) == {"chosen": 0.0, "probability": 0.0}

    def test_a_worse_choice_is_as_wrong_as_it_is_worse(self) -> None:
        given = inputs(PROBLEM, torch.float32, "cpu") | {"active": None}
        chosen, probability, state = expected = router(**given)
        wrong = chosen.clone()
        wrong[3] = (wrong[3] + 1) % 6
        judged = errors(given, expected, (wrong, probability, state))
        assert judged["chosen"] > 1e-3
        assert judged["probability"] > 1e-3  # that of another expert

    def test_a_tie_can_go_either_way(self) -> None:
        given = inputs(PROBLEM, torch.float32, "cpu") | {"active": None}
        weights = given["weights"]._asdict()
        weights["out"][1], weights["balancing"][1] = weights["out"][0], weights["balancing"][0]
        weights["balancing"][:2] += 10  # so that nothing but these two is chosen
        chosen, probability, state = expected = router(**given)
        assert (chosen == 0).all()
        assert errors(given, expected, (chosen + 1, probability, state))["chosen"] == 0

    @pytest.mark.parametrize("wrong", [-1, 6])
    def test_no_class_is_wrong(self, wrong: int) -> None:
        given = inputs(PROBLEM, torch.float32, "cpu")
        chosen, probability, state = expected = router(**given)
        bad = chosen.clone()
        bad[0] = wrong
        assert errors(given, expected, (bad, probability, state))["chosen"] == math.inf

    def test_padding_that_reads_an_expert_is_wrong(self) -> None:
        given = inputs(PROBLEM, torch.float32, "cpu")
        chosen, probability, state = expected = router(**given)
        bad = chosen.clone()
        bad[-1] = 0
        assert errors(given, expected, (bad, probability, state))["chosen"] == math.inf


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("tokens", [1, 17, 64, 272, 2048])
def test_tilings_differ_and_suit_the_target(target: Target, tokens: int) -> None:
    for config in (ModelConfig(), CONFIG):
        found = tilings(target, Problem(config, batch=tokens))
        assert len({tuple(sorted(tiling.items())) for tiling in found}) == len(found) <= 30
        assert all(tiling["RELEASE"] == (target.backend == "hip") for tiling in found)
        assert len(found) >= 5


def test_rare_cases_in_the_interpreter() -> None:
    """No state, no padding, ties, NaN, launches one after the other: see tests/interpreted_router.py."""
    interpreted("tests.interpreted_router", "rare_cases")


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_on_amd_every_wave_waits_for_its_stores_before_its_block_is_reported(target: str) -> None:
    """The last block reads what the others stored: a store must have left its wave at the barrier before the count."""
    from triton.compiler import compile

    problem = Problem(ModelConfig(), batch=1)
    (launch,) = launches(kernel("router"), problem, "bfloat16", tilings(TARGETS[target], problem)[0])
    source, gpu, options = specialise(launch, TARGETS[target])
    text = compile(source, target=gpu, options=options).asm["amdgcn"]
    lines = re.findall(r"^\s+(buffer_store|global_store|s_barrier|s_waitcnt vmcnt\(0\)|global_atomic_add)", text, re.M)
    counted = lines.index("global_atomic_add")
    barrier = max(i for i, line in enumerate(lines[:counted]) if line == "s_barrier")
    store = max(i for i, line in enumerate(lines[:barrier]) if line.endswith("_store"))
    assert "s_waitcnt vmcnt(0)" in lines[store:barrier]


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_full_size_in_fp32_fits_the_shared_memory(name: str) -> None:
    problem = Problem(ModelConfig(), batch=16, slots=17)
    job = Job("router", name, problem, "float32", tilings(TARGETS[name], problem)[0])
    assert compile_one(job).outcome == USABLE
