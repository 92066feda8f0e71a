"""Samplers are lossless: greedy ones equal autoregressive decoding, sampled ones have its distribution.

The distribution is tested by enumeration: all outcomes of three new tokens of a tiny vocabulary, their exact
probabilities from the causal model, and Pearson's chi-square of the counts. The same test must reject wrong samplers.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import equivalence
from runtime.batching import Batcher, Request
from runtime.checkpoint import bundled, load_model, save_model
from runtime.config import DecodingConfig, KernelConfig, replace
from runtime.engine import GenerationResult, generate
from runtime.model.zaya import Zaya
from runtime.samplers import SAMPLERS, acceptance, capturable, reads_draft_logits, two_forward
from runtime.samplers.acceptance import Accepted, Draft, Randomness, choose, constant, verify
from runtime.samplers.state import Decode, Step, finish
from tests.enumeration import DRAWS, RIGHT, WRONG, Enumeration, p_value
from tests.models import TINY, noisy_model, random_ids

torch.set_num_threads(1)
FEW = replace(
    TINY, vocab_size=5, mask_token_id=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, num_experts=3, max_position_embeddings=32, layer_types=("hybrid",),
)  # fmt: skip
TEMPERATURE = 1.2


@cache
def tiny() -> Zaya:
    return noisy_model(seed=2)


@cache
def outcomes() -> Enumeration:
    return Enumeration(noisy_model(FEW, seed=9), (1, 3, 0), 3, TEMPERATURE)


def tokens_of(
    model: Zaya, prompts: Sequence[Sequence[int]], decoding: DecodingConfig, **kwargs: Any
) -> list[list[int]]:
    return generate(model, prompts, decoding, stop_tokens=(), **({"max_new_tokens": 40} | kwargs)).tokens


def prompts_of(count: int) -> list[list[int]]:
    """Prompts of lengths 1, 4, 7 ..."""
    rows = random_ids(count, 3 * count, TINY.vocab_size - 1, seed=3).tolist()
    return [row[: 1 + 3 * i] for i, row in enumerate(rows)]


# Greedy


@pytest.mark.parametrize("anchor_draft", [False, True])
@pytest.mark.parametrize("drafts", [1, 3, 16])
@pytest.mark.parametrize("batch", [1, 7])
def test_greedy_two_forward_equals_greedy_autoregressive(batch: int, drafts: int, anchor_draft: bool) -> None:
    prompts = prompts_of(batch)
    decoding = DecodingConfig("two_forward", drafts, anchor_draft=anchor_draft)
    assert tokens_of(tiny(), prompts, decoding) == tokens_of(tiny(), prompts, DecodingConfig())


def test_greedy_with_random_drafts_is_still_greedy() -> None:
    """What is drafted, and how warm, changes the speed and never the text."""
    expected = tokens_of(tiny(), prompts_of(3), DecodingConfig())
    results = [
        generate(
            tiny(),
            prompts_of(3),
            DecodingConfig("two_forward", 4, draft_temperature=t),
            max_new_tokens=40,
            stop_tokens=(),
        )
        for t in (0.0, 0.7, 50.0)
    ]
    assert all(r.tokens == expected for r in results)
    assert len({r.forwards for r in results}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_anchor_draft_is_always_accepted(temperature: float) -> None:
    """Even when the other drafts are argmax: it is drawn from the target itself, so at the target's temperature."""
    plain, anchored = (
        generate(
            tiny(),
            prompts_of(5),
            DecodingConfig("two_forward", 4, temperature=temperature, anchor_draft=anchor_draft),
            max_new_tokens=41,
            stop_tokens=(),
        )
        for anchor_draft in (False, True)
    )
    assert plain.acceptance_histogram[0] > 5
    assert anchored.acceptance_histogram[0] <= 5  # only a sequence's last step, cut at the length
    assert anchored.forwards < plain.forwards


@pytest.mark.skipif("zaya-nano" not in bundled(), reason="zaya-nano is not in this checkout")
@pytest.mark.parametrize(
    ("batch", "decoding"),
    [(1, DecodingConfig("two_forward", 16)), (5, DecodingConfig("two_forward", 5, anchor_draft=True))],
)
def test_zaya_nano_greedy_two_forward_equals_autoregressive(batch: int, decoding: DecodingConfig) -> None:
    """Ten prompts of 48 tokens; benchmarks/equivalence.py compares 200 of 128."""
    model = load_model("zaya-nano")
    prompts = equivalence.prompts_for(model, 10)
    expected = equivalence.autoregressive(model, prompts, batch=batch, new_tokens=48)
    found = equivalence.compare(model, prompts, expected, decoding, batch=batch, new_tokens=48)
    assert found.different == []
    assert found.acceptance_length > 1.5


def test_the_equivalence_program_finds_a_difference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tiny(), tmp_path)
    arguments = [
        "--model",
        str(tmp_path),
        "--prompts",
        "3",
        "--new-tokens",
        "12",
        "--batch",
        "2",
        "--draft-tokens",
        "3",
    ]
    assert equivalence.main([*arguments, "--prompts-of-others", "1"]) == 0
    out = capsys.readouterr().out
    assert (out.count("3 x 12"), out.count("1 x 12")) == (2, 2 + 3)
    arguments += ["--samplers", "two_forward"]

    def wrong(logits: Tensor, *rest: Any) -> Accepted:  # the worst token instead of the best
        found = verify(logits, *rest)
        return found._replace(token=logits[:, 0].argmin(-1))

    monkeypatch.setattr(acceptance, "verify", wrong)
    assert equivalence.main([*arguments, "--json"]) == 1
    first, _ = json.loads(capsys.readouterr().out)["results"]
    assert len(first["different"]) == 3
    assert all(d["margin"] > 0 and d["expected"] != d["found"] for d in first["different"])


# Mixing


def test_weight_one_never_reads_the_draft_logits() -> None:
    """So it is bit-identical to mixing switched off: 1 * ar + 0 * draft would turn these into NaN."""
    logits, drafts = (
        torch.randn(4, 4, 5),
        Draft(torch.randint(0, 5, (4, 3)), torch.full((4, 3, 5), torch.inf), torch.zeros(3)),
    )
    for temperature in (0.0, 1.0):
        uniform = Randomness(0, 4).uniform(4, logits.device)
        found = verify(logits, drafts, temperature, 1.0, uniform)
        clean = verify(logits, drafts._replace(logits=torch.zeros(4, 3, 5)), temperature, 1.0, uniform)
        assert torch.equal(found.count, clean.count) and torch.equal(found.token, clean.token)
        assert bool(((found.token >= 0) & (found.token < 5)).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mixing_weight_of_one_is_lossless_and_less_is_not(temperature: float) -> None:
    def run(weight: float) -> GenerationResult:
        decoding = DecodingConfig("two_forward", 8, mixing_weight=weight, temperature=temperature)
        return generate(tiny(), prompts_of(6), decoding, max_new_tokens=40, stop_tokens=(), seed=4)

    one, almost, half, none = run(1.0), run(1.0 - 1e-9), run(0.5), run(0.0)
    assert one.tokens == almost.tokens
    assert half.tokens != one.tokens
    assert none.acceptance_length > half.acceptance_length > one.acceptance_length
    if temperature == 0:  # the drafts are the target, so all of them pass
        assert none.acceptance_length > 6


def test_greedy_mixing_takes_the_argmax_of_the_mixed_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, drafted = torch.randn(500, 4, 6, generator=generator), torch.randn(500, 3, 6, generator=generator)
    draft = Draft(drafted.argmax(-1), drafted, torch.zeros(3))
    found = verify(logits, draft, 0.0, 0.4, None)
    best = (0.4 * logits[:, :3] + 0.6 * drafted).argmax(-1)
    for b in range(500):
        passed = list(itertools.takewhile(lambda j, b=b: best[b, j] == draft.tokens[b, j], range(3)))
        assert found.count[b] == len(passed)
        assert found.token[b] == (logits[b, 3].argmax() if len(passed) == 3 else best[b, len(passed)])
    assert len(set(found.count.tolist())) == 4


@pytest.mark.parametrize("weight", [1.0, 0.7, 0.3, 0.0])
@pytest.mark.parametrize("draft_temperature", [0.0, 0.8])
def test_verification_commits_the_mixed_distribution(weight: float, draft_temperature: float) -> None:
    """Row j of what is committed follows the mix of row j, whatever was drafted; the bonus row stays autoregressive."""
    generator = torch.Generator().manual_seed(1)
    logits, drafted = torch.randn(3, 5, generator=generator), torch.randn(2, 5, generator=generator)
    random = np.random.default_rng(7).random
    temperatures, many = torch.full((2,), draft_temperature), drafted.expand(DRAWS, -1, -1)
    uniform = torch.from_numpy(random((DRAWS, 2))) if draft_temperature else None
    draft = Draft(acceptance.draw(many, temperatures, uniform), many, temperatures)
    found = verify(logits.expand(DRAWS, -1, -1), draft, TEMPERATURE, weight, torch.from_numpy(random((DRAWS, 3))))
    committed = torch.cat([draft.tokens, torch.zeros(DRAWS, 1, dtype=torch.int64)], dim=1)
    committed.scatter_(1, found.count[:, None], found.token[:, None])
    targets = torch.cat([weight * logits[:2] + (1 - weight) * drafted, logits[2:]])
    for row, target in enumerate(targets):
        reached = committed[found.count >= row, row]
        if len(reached) > 500:
            expected = torch.softmax(target / TEMPERATURE, -1).double().numpy()
            assert p_value(np.bincount(reached, minlength=5), expected) > RIGHT
    assert (found.count >= 2).sum() > 500 or draft_temperature == 0


# Sampling


def sampled_p_value(decoding: DecodingConfig, *, seed: int = 0) -> float:
    return outcomes().p_value(decoding, seed=seed)


def test_the_enumeration_is_a_distribution_that_no_outcome_dominates() -> None:
    exact = outcomes().probabilities
    assert abs(exact.sum() - 1) < 1e-9
    assert exact.max() < 0.2 and (exact * DRAWS >= 5).sum() > 60


def test_autoregressive_sampling_has_the_enumerated_distribution() -> None:
    assert sampled_p_value(DecodingConfig(temperature=TEMPERATURE)) > RIGHT
    assert sampled_p_value(DecodingConfig(temperature=TEMPERATURE * 1.2)) < WRONG


@pytest.mark.parametrize("anchor_draft", [False, True])
@pytest.mark.parametrize("draft_temperature", [0.0, 0.9])
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_sampled_two_forward_has_the_autoregressive_distribution(
    drafts: int, draft_temperature: float, anchor_draft: bool
) -> None:
    decoding = DecodingConfig(
        "two_forward", drafts, temperature=TEMPERATURE, draft_temperature=draft_temperature, anchor_draft=anchor_draft
    )
    assert sampled_p_value(decoding, seed=1) > RIGHT


@pytest.mark.parametrize("drafts", [16, 24])
def test_sampled_two_forward_with_long_drafts_has_the_autoregressive_distribution(drafts: int) -> None:
    decoding = DecodingConfig("two_forward", drafts, draft_temperature=0.9)
    assert outcomes().p_value(decoding, seed=2, draws=4000) > RIGHT


Verify = Callable[[Tensor, Draft, float, float, Tensor], Accepted]


def accept_always(logits: Tensor, draft: Draft, temperature: float, weight: float, uniform: Tensor) -> Accepted:
    drafts = draft.tokens.shape[1]
    bonus = torch.softmax(logits[:, drafts] / temperature, -1)
    return Accepted(torch.full((len(logits),), drafts), choose(bonus, uniform[:, -1]))


def skip_the_residual(logits: Tensor, draft: Draft, temperature: float, weight: float, uniform: Tensor) -> Accepted:
    """On rejection, draw from the target itself."""
    found = verify(logits, draft, temperature, weight, uniform)
    row = logits[torch.arange(len(logits)), found.count]
    return Accepted(found.count, choose(torch.softmax(row / temperature, -1), uniform[:, -1]))


def bonus_from_the_row_before(
    logits: Tensor, draft: Draft, temperature: float, weight: float, uniform: Tensor
) -> Accepted:
    wrong = torch.cat([logits[:, :-1], logits[:, -2:-1]], dim=1)
    return verify(wrong, draft, temperature, weight, uniform)


def judge_with_the_next_row(
    logits: Tensor, draft: Draft, temperature: float, weight: float, uniform: Tensor
) -> Accepted:
    return verify(logits.roll(-1, dims=1), draft, temperature, weight, uniform)


@pytest.mark.parametrize(
    "wrong", [accept_always, skip_the_residual, bonus_from_the_row_before, judge_with_the_next_row]
)
def test_the_same_test_rejects_wrong_verification(monkeypatch: pytest.MonkeyPatch, wrong: Verify) -> None:
    monkeypatch.setattr(acceptance, "verify", wrong)
    decoding = DecodingConfig("two_forward", 1, temperature=TEMPERATURE, draft_temperature=0.9)
    assert sampled_p_value(decoding) < WRONG


def test_the_same_test_rejects_an_invented_distribution_of_argmax_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """q = softmax(draft logits) for a draft that was certain."""
    monkeypatch.setattr(acceptance, "draft_probabilities", lambda draft: torch.softmax(draft.logits, -1))
    assert sampled_p_value(DecodingConfig("two_forward", 2, temperature=TEMPERATURE)) < WRONG


def test_the_same_test_rejects_a_verifier_whose_state_was_not_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next token's convolutions read the columns of a rejected draft, at its place."""

    def step(decode: Decode) -> Step:
        committed = two_forward.step(decode)
        for layer, columns in enumerate(decode.cache.columns):
            decode.cache.columns[layer] = columns.roll(-1, dims=1)
        return committed

    monkeypatch.setitem(SAMPLERS, "two_forward", step)
    assert sampled_p_value(DecodingConfig("two_forward", 2, temperature=TEMPERATURE)) < WRONG


# Randomness and batches


def test_a_weight_of_zero_is_never_drawn() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]] * 5)
    uniform = torch.tensor([0.0, 1 / 3 - 1e-12, 1 / 3, 0.999999, 1 - 2**-53], dtype=torch.float64)
    assert choose(weights, uniform).tolist() == [1, 1, 3, 3, 3]


def test_a_rejection_that_leaves_nothing_over_redraws_from_the_target() -> None:
    """p and q equal but for the last bit: the residual is zero everywhere, and the last token has no probability."""

    last = torch.full((1, 2), 1 - 2**-53, dtype=torch.float64)
    target = torch.tensor([[[0.0, 0.3, -200.0]] * 2])
    drafted = target[:, :1] + torch.tensor([3e-8, 0.0, 0.0])
    p, q = torch.softmax(target[:, 0], -1), torch.softmax(drafted[:, 0], -1)
    assert q[0, 0] > p[0, 0] and not bool((p > q).any())  # the case is the one described
    found = verify(target, Draft(torch.zeros(1, 1, dtype=torch.int64), drafted, torch.ones(1)), 1.0, 1.0, last)
    assert found.count.tolist() == [0] and found.token.tolist() == [1]


def test_seeds_differ_and_repeat() -> None:
    decoding = DecodingConfig("two_forward", 4, temperature=1.0, draft_temperature=1.0)
    runs = {seed: tokens_of(tiny(), prompts_of(3), decoding, seed=seed) for seed in (0, 1, 2**32, 2**40)}
    assert runs[0] == tokens_of(tiny(), prompts_of(3), decoding, seed=0)
    assert len({str(run) for run in runs.values()}) == len(runs)


def test_identical_prompts_of_one_batch_are_sampled_independently() -> None:
    rows = tokens_of(tiny(), [[5, 6]] * 6, DecodingConfig(temperature=1.0), max_new_tokens=12)
    assert len({tuple(row) for row in rows}) == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "decoding",
    [
        DecodingConfig(),
        DecodingConfig("two_forward", 5),
        DecodingConfig("denoising", 5, denoising_steps=3, verify=True),
        DecodingConfig("denoising", 5, denoising_steps=5, confidence_threshold=0.2),
    ],
)
def test_a_batch_equals_its_sequences_alone(decoding: DecodingConfig, temperature: float) -> None:
    """Sequences stop at different steps and lengths; each one's text depends on the seed and its index alone."""
    warm = temperature if decoding.sampler == "two_forward" else 0.0
    decoding = replace(decoding, temperature=temperature, draft_temperature=warm)
    prompts = prompts_of(8)
    free = tokens_of(tiny(), prompts, decoding, seed=6)
    stops = {free[row][9 * row + 2] for row in range(4)}
    together = generate(tiny(), prompts, decoding, max_new_tokens=40, seed=6, stop_tokens=stops)
    assert len({len(row) for row in together.tokens}) >= 3
    for index, prompt in enumerate(prompts):
        alone = Batcher(tiny(), decoding, batch=1, context=128)
        alone.submit(Request(prompt, 40, seed=(6, index), stop_tokens=sorted(stops)))
        events = list(itertools.takewhile(bool, iter(alone.step, None)))
        assert [token for [event] in events for token in event.tokens] == together.tokens[index]
        assert events[-1][0].finish_reason == together.finish_reasons[index]
        assert len(events) == together.steps[index]


# On the device


STEPS = [
    DecodingConfig(),
    DecodingConfig(temperature=1.0),
    DecodingConfig("two_forward", 4, mixing_weight=0.5, temperature=1.0, draft_temperature=0.5),
    DecodingConfig("two_forward", 1, temperature=1.0, anchor_draft=True),
    DecodingConfig("single_forward", 3, mixing_weight=0.4, temperature=1.0, proposal_levels=(0, 2)),
    DecodingConfig("denoising", 4, temperature=1.0, denoising_steps=2, verify=True),
    DecodingConfig("denoising", 4, denoising_steps=2, confidence_threshold=0.5, verify=True),
    DecodingConfig("denoising", 4, temperature=1.0, denoising_steps=2),
]


@pytest.mark.parametrize("decoding", STEPS, ids=str)
def test_only_a_capturable_step_never_reads_the_device(decoding: DecodingConfig) -> None:
    """On tensors without values whatever reads one fails."""
    model = Zaya(TINY).to("meta").freeze()
    model.kernels = KernelConfig({1_000_000: "gather"})
    decode = decode_of(model, decoding, "meta")
    with torch.no_grad():
        try:
            found = [SAMPLERS[decoding.sampler](decode) for _ in range(2)]
        except (RuntimeError, NotImplementedError):
            assert not capturable(decoding)
            return
    assert capturable(decoding)
    assert all(step.tokens.shape[0] == step.counts.shape[0] == 2 for step in found)


@cache
def folder_of(file: str) -> str:
    return Path(file).parent.name


@pytest.mark.parametrize("decoding", [d for d in STEPS if capturable(d)], ids=str)
def test_a_capturable_step_copies_nothing_to_the_device_and_draws_as_much_as_every_other(
    decoding: DecodingConfig,
) -> None:
    """A graph replays the addresses it saw: of constants made before, and of uniforms in the order of its draws."""
    drawn: list[int] = []
    buffer = torch.rand(2, 8, dtype=torch.float64)

    class Static(Randomness):
        def uniform(self, count: int, device: torch.device) -> Tensor:
            drawn.append(count)
            return buffer[:, :count]

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            frames = {folder_of(f.f_code.co_filename) for f, _ in traceback.walk_stack(sys._getframe(1))}
            caller = next(name for name in ("model", "samplers", "tests") if name in frames)
            assert caller == "model" or not func.__name__.startswith("lift_fresh")
            return func(*args, **(kwargs or {}))

    decode = decode_of(tiny(), decoding, "cpu")
    decode.randomness = Static(0, 2)
    per_step = []
    with torch.no_grad():
        for number in range(4):
            drawn.clear()
            with Copies() if number else nullcontext():
                step = SAMPLERS[decoding.sampler](decode)
            finish(decode, step)
            per_step.append(list(drawn))
    assert all(counts == per_step[0] for counts in per_step)
    assert bool(per_step[0]) == (decoding.temperature > 0)


def test_constants_stay_at_the_address_that_a_graph_saw() -> None:
    first = constant((0.5, 0.25), torch.float32, "cpu")
    for number in range(1000):
        constant((0.5, float(number)), torch.float32, "cpu")
    assert constant((0.5, 0.25), torch.float32, "cpu") is first


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("draft_temperature", [0.0, 0.8])
@pytest.mark.parametrize("sampler", ["two_forward", "single_forward"])
def test_draft_logits_that_nobody_reads_may_be_lost(
    monkeypatch: pytest.MonkeyPatch, sampler: Any, draft_temperature: float, weight: float, temperature: float
) -> None:
    decoding = DecodingConfig(sampler, 3, weight, temperature, draft_temperature)
    expected, draw = tokens_of(tiny(), prompts_of(3), decoding), Decode.draw

    def lost(*arguments: Any) -> Draft:
        found = draw(*arguments)
        return found._replace(logits=torch.full_like(found.logits, torch.nan))

    monkeypatch.setattr(Decode, "draw", lost)
    if reads_draft_logits(decoding):
        assert tokens_of(tiny(), prompts_of(3), decoding) != expected
    else:
        assert tokens_of(tiny(), prompts_of(3), decoding) == expected


def decode_of(model: Zaya, decoding: DecodingConfig, device: str) -> Decode:
    """Two sequences that have an anchor and nothing before it."""
    cache = model.new_cache(2, 60, decoding.slots)
    anchors = torch.full((2, 1), 5, device=device)
    return Decode(model, cache, decoding, anchors, Randomness(0, 2), [0, 1])
