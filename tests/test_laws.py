"""Laws of all samplers, over random models, requests, settings and deployments.

Lossless equals autoregressive: every committed token was drawn from the autoregressive logits of its own prefix (of the
mix, where logits are mixed), and greedy tokens are those of autoregressive decoding. Before every step the cache holds
what a fresh prefill of the same tokens does, every tensor by name, whatever was accepted, rejected or switched before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.batching import Batcher, Request
from runtime.cache import Cache
from runtime.checkpoint import model_hash
from runtime.config import EXPERT_MODES, DecodingConfig, KernelConfig, ModelConfig, RopeParameters
from runtime.deployment import Deployment, Rule
from runtime.engine import generate
from runtime.layout import causal
from runtime.model.zaya import Zaya
from runtime.policy import using
from runtime.samplers import SAMPLERS
from runtime.samplers.state import Decode, Step, TraceStep
from tests.models import noisy_model

torch.set_num_threads(1)
VOCABULARY, CONTEXT = 23, 64
EXAMPLES = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Heads, groups, windows, rotations, convolutions, experts and biases, all small."""
    groups, repeat = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)]))
    kinds = draw(st.lists(st.sampled_from(["hybrid", "hybrid_sliding"]), min_size=1, max_size=3))
    rotated = st.sampled_from([0.25, 0.5, 1.0])
    before, after = draw(st.sampled_from([(2, 2), (1, 2), (2, 1), (3, 2), (2, 3)]))
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=draw(st.sampled_from([16, 20])),
        num_hidden_layers=len(kinds),
        num_attention_heads=groups * repeat,
        num_key_value_heads=groups,
        head_dim=8,
        num_experts=draw(st.integers(1, 5)),
        moe_intermediate_size=12,
        router_hidden_size=8,
        cca_time0=before,
        cca_time1=after,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        lm_head_bias=draw(st.booleans()),
        sliding_window=draw(st.integers(1, 9)),
        layer_types=tuple(kinds),  # type: ignore[arg-type]
        rope_parameters={
            "hybrid": RopeParameters(1000.0, draw(rotated)),
            "hybrid_sliding": RopeParameters(50.0, draw(rotated)),
        },
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        mask_token_id=VOCABULARY - 1,
    )


TEMPERATURES = st.sampled_from([0.0, 0.0, 0.7, 1.5])
DRAFTS = st.integers(1, 6)


@st.composite
def autoregressive(draw: st.DrawFn, weights: st.SearchStrategy[float]) -> DecodingConfig:
    return DecodingConfig(temperature=draw(TEMPERATURES))


@st.composite
def two_forward(draw: st.DrawFn, weights: st.SearchStrategy[float]) -> DecodingConfig:
    return DecodingConfig(
        "two_forward",
        draw(DRAFTS),
        draw(weights),
        draw(TEMPERATURES),
        draw(TEMPERATURES),
        anchor_draft=draw(st.booleans()),
    )


@st.composite
def single_forward(draw: st.DrawFn, weights: st.SearchStrategy[float]) -> DecodingConfig:
    drafts = draw(DRAFTS)
    levels = draw(st.none() | st.sets(st.integers(1, drafts)).map(lambda found: (0, *sorted(found))))
    return DecodingConfig(
        "single_forward", drafts, draw(weights), draw(TEMPERATURES), draw(TEMPERATURES), proposal_levels=levels
    )


@st.composite
def denoising(draw: st.DrawFn, weights: st.SearchStrategy[float], verify: bool = True) -> DecodingConfig:
    drafts = draw(DRAFTS)
    steps = draw(st.integers(1, drafts))
    return DecodingConfig(
        "denoising",
        drafts,
        draw(weights) if verify else 1.0,
        draw(TEMPERATURES),
        draw(TEMPERATURES) if verify and steps == 1 else 0.0,
        denoising_steps=steps,
        confidence_threshold=draw(st.none() | st.sampled_from([0.0, 0.2, 0.9])),
        verify=verify,
    )


WAYS: dict[str, Callable[..., st.SearchStrategy[DecodingConfig]]] = {
    "autoregressive": autoregressive,
    "two_forward": two_forward,
    "single_forward": single_forward,
    "denoising": denoising,
}
Sampler = Callable[[Decode], Step]
LOSSLESS = st.just(1.0)
ANY_WEIGHT = st.sampled_from([1.0, 0.6, 0.0])


@dataclass(frozen=True)
class Case:
    """Requests on some slots; later ones come after the first steps."""

    model: ModelConfig
    seed: int
    prompts: list[list[int]]
    limits: list[int]
    slots: int
    late: int  # requests that are submitted after two steps
    stops: list[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 5))
    token = st.integers(0, VOCABULARY - 1)
    return Case(
        draw(models()),
        draw(st.integers(0, 10**6)),
        draw(st.lists(st.lists(token, min_size=1, max_size=12), min_size=count, max_size=count)),
        draw(st.lists(st.integers(1, 12), min_size=count, max_size=count)),
        draw(st.integers(1, count)),
        draw(st.integers(0, count - 1)),
        draw(st.lists(token, max_size=2)),
    )


@dataclass
class Run:
    """A case decoded, with the cache compared to fresh prefills before every step."""

    model: Zaya
    texts: list[list[int]]  # prompts and what was committed so far
    trace: list[TraceStep] = field(default_factory=list)
    checks: int = 0

    def check(self, decode: Decode) -> None:
        """The cached tokens, those behind and the anchor are the text; the state is that of the cached ones."""
        for row, (index, pending) in enumerate(zip(decode.sequences, decode.pending, strict=True)):
            length, text = decode.cache.lengths[row], self.texts[index]
            assert length + len(pending) == len(text) and pending == text[length:]
            compare(decode.cache.state(row), prefilled(self.model, text[:length], decode.cache).state(0))
            self.checks += 1

    def checked(self, sampler: Sampler) -> Sampler:
        """The sampler behind a comparison."""

        def step(decode: Decode) -> Step:
            self.check(decode)
            return sampler(decode)

        return step


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor by name, up to rounding: 1e-5 of its largest value."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def prefilled(model: Zaya, tokens: list[int], like: Cache) -> Cache:
    """One sequence's cache after a single forward."""
    cache = model.new_cache(1, max(1, len(tokens)), like.ring - model.config.conv_history)
    if tokens:
        model.forward(torch.tensor([tokens]), causal(len(tokens)), cache)
        cache.advance([len(tokens)])
    return cache


def decode(case: Case, decoding: DecodingConfig | tuple[Rule, ...]) -> Run:
    """Decode a case; the states are compared on the way."""
    model = noisy_model(case.model, seed=case.seed)
    followed: Any = decoding
    if isinstance(decoding, tuple):
        followed = Deployment("random", model_hash(model), {}, decoding, "now", "test")
    run = Run(model, [list(prompt) for prompt in case.prompts])
    requests = [
        Request(tuple(prompt), limit, (case.seed, index), case.stops)
        for index, (prompt, limit) in enumerate(zip(case.prompts, case.limits, strict=True))
    ]
    with using(model), pytest.MonkeyPatch.context() as patch:
        for name, sampler in list(SAMPLERS.items()):
            patch.setitem(SAMPLERS, name, run.checked(sampler))
        batcher = Batcher(model, followed, batch=case.slots, context=24, trace=run.trace)
        now = len(requests) - case.late
        for request in requests[:now]:
            batcher.submit(request)
        for step in range(80):  # more than any case needs
            if step == 2:
                for request in requests[now:]:
                    batcher.submit(request)
            for index, tokens, _ in batcher.step():
                run.texts[index] += tokens
        assert not batcher.active and not batcher.waiting
    assert run.checks > 0
    return run


def committed_rows(run: Run, case: Case) -> list[tuple[TraceStep, int, int, int, int]]:
    """(step, row, r, request, place in its text) of every token that was kept: the r-th of the step's row."""
    ends = [len(prompt) for prompt in case.prompts]
    found = []
    for step in run.trace:
        for row, (index, count) in enumerate(zip(step.sequences, step.committed, strict=True)):
            for r in range(min(count, len(run.texts[index]) - ends[index])):
                found.append((step, row, r, index, ends[index] + r))
            ends[index] = min(ends[index] + count, len(run.texts[index]))
    assert ends == [len(text) for text in run.texts]
    return found


def check_targets(run: Run, case: Case, weight: float) -> None:
    """Row r of a step is the (mixed) autoregressive distribution after the r tokens before it."""
    exact = [run.model.logits(torch.tensor([text]))[0] for text in run.texts]
    for step, row, r, index, place in committed_rows(run, case):
        expected = exact[index][place - 1]
        if step.draft is not None and weight != 1:
            lengths, drafts = step.draft.lengths, step.draft.tokens.shape[1]
            if r < (drafts if lengths is None else int(lengths[row])):
                expected = weight * expected + (1 - weight) * step.draft.logits[row, r]
        scale = float(exact[index].abs().max())
        torch.testing.assert_close(step.logits[row, r], expected, rtol=0, atol=2e-5 * scale)


def check_greedy(run: Run, case: Case) -> None:
    expected = generate(
        run.model, case.prompts, DecodingConfig(), max_new_tokens=case.limits, stop_tokens=case.stops
    ).tokens
    assert [text[len(p) :] for text, p in zip(run.texts, case.prompts, strict=True)] == expected


def test_every_sampler_is_tried() -> None:
    assert WAYS.keys() == SAMPLERS.keys()


@pytest.mark.parametrize("sampler", WAYS)
@EXAMPLES
@given(case=cases(), data=st.data())
def test_lossless_equals_autoregressive(sampler: str, case: Case, data: st.DataObject) -> None:
    decoding = data.draw(WAYS[sampler](LOSSLESS))
    with torch.inference_mode():
        run = decode(case, decoding)
        check_targets(run, case, 1.0)
    if decoding.temperature == 0:
        check_greedy(run, case)


@pytest.mark.parametrize("sampler", [name for name in WAYS if name != "autoregressive"])
@EXAMPLES
@given(case=cases(), data=st.data())
def test_mixed_tokens_are_drawn_from_the_mix_of_their_own_prefix(sampler: str, case: Case, data: st.DataObject) -> None:
    decoding = data.draw(WAYS[sampler](ANY_WEIGHT))
    with torch.inference_mode():
        check_targets(decode(case, decoding), case, decoding.mixing_weight)


@EXAMPLES
@given(case=cases(), data=st.data())
def test_unverified_blocks_leave_the_state_of_a_fresh_prefill(case: Case, data: st.DataObject) -> None:
    with torch.inference_mode():
        decode(case, data.draw(denoising(LOSSLESS, verify=False)))


def rules(*ways: st.SearchStrategy[DecodingConfig]) -> st.SearchStrategy[tuple[Rule, ...]]:
    modes = st.sampled_from(EXPERT_MODES)
    return st.lists(
        st.builds(
            Rule,
            st.one_of(*ways),
            st.builds(lambda one, more: KernelConfig({1: one, 1000: more}), modes, modes),
            st.none() | st.integers(1, 4),
            st.none() | st.integers(4, 20),
        ),
        min_size=2,
        max_size=5,
    ).map(tuple)


@EXAMPLES
@given(case=cases(), chosen=rules(*(way(LOSSLESS) for way in WAYS.values())))
def test_lossless_rules_equal_autoregressive_whatever_the_switches(case: Case, chosen: tuple[Rule, ...]) -> None:
    with torch.inference_mode():
        run = decode(case, chosen)
        check_targets(run, case, 1.0)
    if all(rule.decoding.temperature == 0 for rule in chosen):
        check_greedy(run, case)


@EXAMPLES
@given(case=cases(), chosen=rules(denoising(LOSSLESS, verify=False), *(way(ANY_WEIGHT) for way in WAYS.values())))
def test_any_switches_leave_the_state_of_a_fresh_prefill(case: Case, chosen: tuple[Rule, ...]) -> None:
    with torch.inference_mode():
        decode(case, chosen)


def test_the_laws_see_a_state_that_was_not_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns of a rejected draft where the next token's convolutions look."""
    case = Case(small_model(), 3, [[1, 2, 3], [4]], [12, 12], 2, 0, [])

    def wrong(cache: Cache, counts: list[int]) -> None:
        advance(cache, counts)
        if max(counts) < 4:
            cache.columns[0].copy_(cache.columns[0].roll(1, dims=1))

    advance = Cache.advance
    decode(case, DecodingConfig("two_forward", 4))  # right before it is wrong
    monkeypatch.setattr(Cache, "advance", wrong)
    with pytest.raises(AssertionError, match="layers"):
        decode(case, DecodingConfig("two_forward", 4))


def test_the_laws_see_a_switch_without_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(small_model(), 3, [[1, 2, 3], [4]], [3, 12], 2, 0, [])
    policy = (
        Rule(DecodingConfig(), KernelConfig(), max_batch=1),
        Rule(DecodingConfig("denoising", 4), KernelConfig()),
    )
    decode(case, policy)
    monkeypatch.setattr(Decode, "settle", lambda decode: setattr(decode, "behind", None))
    with pytest.raises(AssertionError):
        decode(case, policy)


def test_the_laws_see_a_target_of_another_prefix() -> None:
    case = Case(small_model(), 3, [[1, 2, 3], [4]], [12, 12], 2, 0, [])
    with torch.inference_mode():
        run = decode(case, DecodingConfig("two_forward", 4))
        check_targets(run, case, 1.0)
        run.trace[1] = run.trace[1]._replace(logits=run.trace[1].logits.roll(1, dims=1))
        with pytest.raises(AssertionError):
            check_targets(run, case, 1.0)


def small_model() -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=3,
        moe_intermediate_size=12,
        router_hidden_size=8,
        max_position_embeddings=CONTEXT,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        mask_token_id=VOCABULARY - 1,
    )
