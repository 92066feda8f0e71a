"""generate(): what it refuses, where it stops, what it counts, and how it follows a deployment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from hardware.files import UserError
from runtime import batching
from runtime.checkpoint import model_hash
from runtime.config import DecodingConfig, KernelConfig, replace
from runtime.conversion.objective import next_token_loss
from runtime.deployment import Deployment, Rule, save_deployment
from runtime.engine import GenerationResult, generate
from runtime.model.zaya import Zaya
from tests.models import TINY, noisy_model, random_ids

torch.set_num_threads(1)
AUTOREGRESSIVE = DecodingConfig()
TWO_FORWARD = DecodingConfig("two_forward", 4)
SAMPLERS = pytest.mark.parametrize("decoding", [AUTOREGRESSIVE, TWO_FORWARD], ids=lambda d: d.sampler)
ALL = pytest.mark.parametrize(
    "decoding",
    [
        AUTOREGRESSIVE,
        TWO_FORWARD,
        DecodingConfig("single_forward", 4, proposal_levels=(0, 3)),
        DecodingConfig("denoising", 4, denoising_steps=2),
        DecodingConfig("denoising", 4, denoising_steps=2, verify=True),
    ],
    ids=["autoregressive", "two_forward", "single_forward", "denoising", "denoising-verified"],
)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]


@pytest.fixture(scope="module")
def model() -> Zaya:
    return noisy_model(seed=2)


@pytest.fixture(autouse=True)
def _settings_put_back(model: Zaya) -> Iterator[None]:
    kernels = model.kernels
    yield
    model.kernels = kernels


def run(model: Zaya, decoding: Any, prompts: Any = PROMPTS, **kwargs: Any) -> GenerationResult:
    return generate(model, prompts, decoding, **({"max_new_tokens": 20, "stop_tokens": ()} | kwargs))


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "a prompt must have at least one token, but prompt 1 is empty"),
        ([[1, TINY.vocab_size]], {}, f"0 <= token < vocab_size = {TINY.vocab_size} must hold, but prompt 0 breaks it"),
        ([[1], [-1]], {}, "but prompt 1 breaks it"),
        ([[1] * 109], {}, "must fit the context of 128, but prompt 0 needs 109 \\+ 20 = 129"),
        ([[1] * 500], {"max_new_tokens": 1}, "must fit the context"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens >= 1 must hold, but got 0"),
        ([[1]], {"seed": -1}, "seed >= 0 must hold, but got -1"),
    ],
)
@ALL
def test_bad_requests(model: Zaya, decoding: DecodingConfig, prompts: Any, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(model, decoding, prompts, **changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_tokens": 0}, "draft_tokens >= 1 must hold, but got 0"),
        ({"mixing_weight": 1.5}, "0 <= mixing_weight <= 1 must hold, but got 1.5"),
        ({"mixing_weight": float("nan")}, "0 <= mixing_weight <= 1 must hold, but got nan"),
        ({"temperature": -0.1}, "temperature >= 0 must hold"),
        ({"draft_temperature": -1.0}, "draft_temperature >= 0 must hold"),
        ({"mixing_weight": 0.5}, "autoregressive decoding drafts nothing"),
        ({"sampler": "three_forward"}, "unknown sampler 'three_forward'; known: autoregressive, denoising"),
    ],
)
def test_impossible_decoding(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DecodingConfig(**settings)


@ALL
def test_the_whole_context_can_be_used(model: Zaya, decoding: DecodingConfig) -> None:
    result = run(model, decoding, [[1] * 108, [2]])
    assert [len(row) for row in result.tokens] == [20, 20]


def test_a_model_without_mask_decodes_autoregressively_only() -> None:
    plain = noisy_model(replace(TINY, mask_token_id=None))
    assert len(run(plain, AUTOREGRESSIVE, [[1]]).tokens[0]) == 20
    with pytest.raises(UserError, match="this model's config has no mask_token_id"):
        run(plain, TWO_FORWARD, [[1]])


@ALL
@pytest.mark.parametrize("limit", [1, 2, 5, 17])
def test_exactly_as_many_tokens_as_asked_for(model: Zaya, decoding: DecodingConfig, limit: int) -> None:
    whole, cut = run(model, decoding), run(model, decoding, max_new_tokens=limit)
    assert cut.tokens == [row[:limit] for row in whole.tokens]
    assert cut.finish_reasons == ["length"] * len(PROMPTS)


@ALL
def test_a_stop_token_ends_a_sequence_and_is_its_last_one(model: Zaya, decoding: DecodingConfig) -> None:
    free = run(model, decoding).tokens
    stops = {free[0][6], free[2][2]}
    result = run(model, decoding, stop_tokens=sorted(stops))
    for row, full, reason in zip(result.tokens, free, result.finish_reasons, strict=True):
        at = next((i for i, token in enumerate(full) if token in stops), None)
        assert row == (full if at is None else full[: at + 1])
        assert reason == ("length" if at is None else "stop")
    assert "stop" in result.finish_reasons


def test_the_models_own_end_tokens_are_the_default(model: Zaya) -> None:
    free = run(model, TWO_FORWARD).tokens
    for ends in (free[2][3], [27, free[2][3]]):
        ending = noisy_model(replace(TINY, eos_token_id=ends), seed=2)
        default = generate(ending, PROMPTS, TWO_FORWARD, max_new_tokens=20)
        assert default.tokens == run(model, TWO_FORWARD, stop_tokens=[free[2][3]]).tokens
        assert run(ending, TWO_FORWARD).tokens == free  # an empty list of stop tokens stops nothing


@SAMPLERS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stops", [(), (1, 3, 11)])
def test_counters_agree_with_the_tokens(
    model: Zaya, decoding: DecodingConfig, temperature: float, stops: tuple[int, ...]
) -> None:
    result = run(model, replace(decoding, temperature=temperature), stop_tokens=stops, seed=3)
    committed, slots = sum(map(len, result.tokens)), decoding.slots
    histogram = result.acceptance_histogram
    assert sum((n + 1) * count for n, count in enumerate(histogram)) == committed
    assert sum(histogram) == sum(result.steps)
    assert result.acceptance_length == committed / sum(result.steps)
    assert 1 <= result.acceptance_length <= slots and len(histogram) <= slots and histogram[-1] > 0
    assert all(-(-len(row) // slots) <= n <= len(row) for row, n in zip(result.tokens, result.steps, strict=True))

    kinds = {"decode"} if decoding.sampler == "autoregressive" else {"draft", "verify"}
    assert set(result.counters) == kinds and len(kinds) == decoding.forwards_per_step
    for counter in result.counters.values():
        assert counter.forwards == max(result.steps)  # the longest sequence sees every step
        assert counter.slots == sum(result.steps) * slots  # a finished sequence takes no slots
        per_layer = counter.experts_per_layer()
        assert len(per_layer) == TINY.num_hidden_layers
        assert all(0 <= n <= TINY.num_experts for n in per_layer)
    assert result.forwards == len(kinds) * max(result.steps)
    assert result.slots == len(kinds) * sum(result.steps) * slots
    assert result.tokens_per_forward == committed / result.forwards
    assert result.tokens_per_second == committed / result.decode_seconds > 0
    assert result.prefill_seconds > 0


def test_counted_experts_are_those_that_ran(model: Zaya, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    forward = Zaya.run

    def recorded(self: Zaya, *args: Any, **kwargs: Any) -> Any:
        hidden, routes = forward(self, *args, **kwargs)
        seen.append([len(set(layer.tolist()) - {TINY.num_experts}) for layer in routes])
        return hidden, routes

    monkeypatch.setattr(Zaya, "run", recorded)
    result = run(model, TWO_FORWARD)
    del seen[: len(seen) % 2]  # the prefill
    for kind, mine in (("draft", seen[::2]), ("verify", seen[1::2])):
        expected = [sum(layer) / len(mine) for layer in zip(*mine, strict=True)]
        assert result.counters[kind].experts_per_layer() == pytest.approx(expected)


@ALL
def test_prompts_longer_than_one_prefill_forward(
    model: Zaya, decoding: DecodingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [random_ids(1, n, 20, seed=n)[0].tolist() for n in (23, 1, 11, 6, 12)]
    expected = run(model, decoding, prompts).tokens
    for width in (1, 4, 5, 11):
        monkeypatch.setattr(batching, "PREFILL_TOKENS", width)
        assert run(model, decoding, prompts).tokens == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_decodes_too(dtype: str) -> None:
    model = noisy_model(seed=2).to(getattr(torch, dtype)).freeze()
    for decoding in (AUTOREGRESSIVE, TWO_FORWARD, replace(TWO_FORWARD, temperature=1.0, draft_temperature=1.0)):
        result = run(model, decoding)
        assert all(len(row) == 20 and min(row) >= 0 and max(row) < TINY.vocab_size for row in result.tokens)


def test_a_model_can_be_trained_after_it_has_generated() -> None:
    model = noisy_model()
    run(model, TWO_FORWARD)
    model.train().requires_grad_(True)
    next_token_loss(model, random_ids(2, 9, TINY.vocab_size)).total.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_package_offers_the_public_names() -> None:
    assert runtime.generate is generate and runtime.GenerationResult is GenerationResult
    assert runtime.Batcher is batching.Batcher and runtime.Request is batching.Request
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        runtime.nothing  # noqa: B018


def deployment_for(model: Zaya, **changes: Any) -> Deployment:
    rules = (
        Rule(TWO_FORWARD, KernelConfig({1: "gather", 1000: "dense"}), max_batch=2, max_context=30),
        Rule(replace(TWO_FORWARD, draft_tokens=2), KernelConfig({1000: "grouped"}, threads=2), max_batch=2),
        Rule(AUTOREGRESSIVE, KernelConfig({1000: "loop"}), max_batch=64),
    )
    return Deployment("tiny", model_hash(model), {}, rules, "2026-01-01", "test", **changes)


@pytest.mark.parametrize(
    ("batch", "context", "rule"), [(1, 5, 0), (2, 30, 0), (2, 31, 1), (3, 5, 2), (64, 5, 2), (65, 999, 2)]
)
def test_the_first_rule_that_holds_serves_else_the_last(model: Zaya, batch: int, context: int, rule: int) -> None:
    deployment = deployment_for(model)
    assert deployment.rule_for(batch, context) is deployment.rules[rule]


def test_generation_follows_a_deployment_by_batch_and_context(
    model: Zaya, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []  # noted, not set: two busy threads on a busy machine would take a minute
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    deployment = deployment_for(model)
    path = save_deployment(deployment, tmp_path / "deployment.yaml")
    for decoding in (deployment, path, str(path)):
        for prompts, rule in ([[1, 2]] * 2, 0), ([[1] * 31], 1), (PROMPTS, 2):
            threads.clear()
            expected = deployment.rules[rule]
            result = run(model, decoding, prompts)
            assert result.decoding == expected.decoding
            assert result.kernels.experts == expected.kernels.experts
            assert threads == ([2] if rule == 1 else [])
            assert [served.steps for served in result.served] == [max(result.steps)]
            assert model.kernels.experts == KernelConfig().experts  # and the model is left as it was
            assert result.tokens == run(model, AUTOREGRESSIVE, prompts).tokens  # tuning never changes the text


def test_a_deployment_of_another_model_is_refused(model: Zaya) -> None:
    other = noisy_model(seed=3)
    assert model_hash(other) != model_hash(model)
    with pytest.raises(
        UserError, match=rf"tuned for tiny \({model_hash(model)}\), but the model is {model_hash(other)}"
    ):
        run(other, deployment_for(model))
    assert other.kernels == KernelConfig()


def test_a_deployment_that_does_not_exist_is_named(model: Zaya, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing\.yaml"):
        run(model, tmp_path / "nothing.yaml")
