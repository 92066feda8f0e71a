"""Forwards beside the eager ones: every sampler's and mode's agree, and what is wrong is found, at odd sizes too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from runtime import engines
from runtime.config import SAMPLER_NAMES, DecodingConfig, ExpertMode, KernelConfig, Sampler, replace
from runtime.engines import obstacle
from runtime.layout import Layout, causal
from runtime.model.moe import Experts
from runtime.model.zaya import Zaya
from runtime.numerics import ODD_DRAFTS, ODD_LENGTHS, ODD_LEVELS, Agreement, Forward, Reference, forwards_of
from tests.models import TINY, noisy_model

MODES = tuple(KernelConfig({1_000_000: mode}) for mode in ("loop", "grouped", "gather", "dense"))
SETTINGS: dict[Sampler, DecodingConfig] = {
    "autoregressive": DecodingConfig(),
    "two_forward": DecodingConfig("two_forward", 3),
    "single_forward": DecodingConfig("single_forward", 3, proposal_levels=(0, 2)),
    "denoising": DecodingConfig("denoising", 4, denoising_steps=2),
}


@pytest.fixture(scope="module")
def model() -> Zaya:
    return noisy_model(TINY)


@pytest.fixture(scope="module")
def reference(model: Zaya) -> Reference:
    return Reference(model)


def lean(model: Zaya) -> list[KernelConfig]:
    return [KernelConfig(engine="lean")] if obstacle(model, "lean") is None else []


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_samplers_forwards_agree_in_every_mode(sampler: Sampler, model: Zaya, reference: Reference) -> None:
    before = model.kernels
    for kernels in (*MODES, *lean(model)):
        for batch in (1, 2):
            found = reference.compare(SETTINGS[sampler], kernels, batch, 20)
            assert found.obstacle("float32") is None and found.error < 1e-5, (kernels, found)
            assert found.positions > sum(ODD_LENGTHS)  # the prefill's, and the forwards'
    assert model.kernels is before


def test_the_forwards_of_a_step() -> None:
    """As many slots as the settings say, of the widest; a verified block is drafted and verified."""
    for decoding in SETTINGS.values():
        found = forwards_of(decoding)
        assert max(f.slots for f in found) == decoding.slots
        assert max(f.layout("cpu").committed for f in found) == decoding.kept_slots
    assert [f.kind for f in forwards_of(replace(SETTINGS["denoising"], verify=True))] == ["draft", "causal"]
    assert len(forwards_of(replace(SETTINGS["denoising"], denoising_steps=1))) == 1
    assert ODD_DRAFTS + 1 == 7 and max(ODD_LEVELS) < ODD_DRAFTS


def wrong(mode: ExpertMode, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    right = getattr(Experts, f"_{mode}")
    return lambda *given: change(right(*given))


def drop_last_of_odd(found: torch.Tensor) -> torch.Tensor:
    return torch.cat([found[:-1], 0 * found[-1:]]) if len(found) % 2 else found


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (lambda found: found * 1.01, 1e-4),
        (drop_last_of_odd, 1e-2),
        (lambda found: found * math.nan, math.inf),
    ],
)
def test_a_wrong_mode_is_found(
    change: Callable[[torch.Tensor], torch.Tensor], least: float, model: Zaya, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is judged where its own workload is right: batch 2 sends an even number of tokens."""
    monkeypatch.setattr(Experts, "_dense", wrong("dense", change))
    found = Reference(model).compare(DecodingConfig(), MODES[3], 2, 20)
    assert found.obstacle("float32") is not None
    assert found.error > least or math.isnan(found.error)


def test_a_wrong_layout_and_a_forward_that_keeps_nothing_are_found(
    model: Zaya, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that masks drafts causally; and one that computes rightly, but leaves the cache as it was."""
    if not lean(model):
        pytest.fail("the engine lean must be built for this test")
    right, kernels = engines.run, KernelConfig(engine="lean")

    def causally(model: Zaya, tokens: torch.Tensor, layout: Layout, *rest: Any) -> Any:
        return right(model, tokens, causal(layout.slots) if layout.visible is not None else layout, *rest)

    def forgetful(model: Zaya, tokens: torch.Tensor, layout: Layout, cache: Any, counts: Any) -> Any:
        kept = [t.clone() for t in cache.keys]
        found = right(model, tokens, layout, cache, counts)
        for store, before in zip(cache.keys, kept, strict=True):
            store.copy_(before)
        return found

    for fault, decoding in ((causally, SETTINGS["two_forward"]), (forgetful, SETTINGS["two_forward"])):
        with monkeypatch.context() as patch:
            patch.setattr("runtime.engines.run", fault)
            found = Reference(model).compare(decoding, kernels, 2, 20)
        assert found.error > 1e-2 and "more than 0.0001" in (found.obstacle("float32") or "")


def test_a_narrow_type_is_allowed_its_rounding_and_no_more() -> None:
    found = Agreement(error=0.05, rerouted=0.6, argmax=0.95, positions=100)
    assert found.obstacle("bfloat16") is None
    assert "0.05 of their size" in (found.obstacle("float32") or "")
    assert "60% of the positions" in (replace(found, error=1e-6).obstacle("float32") or "")
    assert replace(found, error=1e-6, rerouted=0.02).obstacle("float32") is None
    assert replace(found, error=1.0).obstacle("bfloat16") and replace(found, error=math.nan).obstacle("bfloat16")


def test_bfloat16_agrees_within_its_rounding_and_a_fault_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = noisy_model(TINY).to(torch.bfloat16)
    reference = Reference(narrow)
    for kernels in (MODES[3], *lean(narrow)):
        found = reference.compare(SETTINGS["single_forward"], kernels, 3, 20)
        assert found.obstacle("bfloat16") is None and found.error > 1e-4, (kernels, found)
    monkeypatch.setattr(Experts, "_dense", wrong("dense", drop_last_of_odd))
    assert Reference(narrow).compare(DecodingConfig(), MODES[3], 2, 20).obstacle("bfloat16") is not None


def test_a_larger_cache_brings_another_text(model: Zaya) -> None:
    """What was kept for a smaller one is not compared with it."""
    reference = Reference(model)
    for count in (2, 24):
        found = reference.compare(DecodingConfig("two_forward", count), MODES[1], 2, 20)
        assert found.error < 1e-5
    assert reference.compare(DecodingConfig("two_forward", 2), MODES[1], 2, 20).error < 1e-5
    assert Forward("draft", 1, 2).slots == 3
