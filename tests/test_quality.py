"""Quality: zero distance for what must have none, known values elsewhere, intervals that cover."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hardware.files import UserError
from runtime.checkpoint import random_model
from runtime.config import DecodingConfig, ModelConfig
from runtime.conversion.tasks import generate as problem_of
from runtime.engine import generate
from runtime.model.zaya import Zaya
from runtime.quality import bootstrap, disagreement, exact_match, negative_log_likelihood, wilson

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    moe_intermediate_size=24,
    router_hidden_size=16,
    max_position_embeddings=128,
    eos_token_id=None,
    mask_token_id=39,
)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]


@pytest.fixture(scope="module")
def model() -> Zaya:
    return random_model(TINY, seed=3).freeze()


def test_greedy_output_never_disagrees_and_another_token_is_found(model: Zaya) -> None:
    outputs = generate(model, PROMPTS, DecodingConfig(), max_new_tokens=12).tokens
    assert disagreement(model, PROMPTS, outputs) == 0
    outputs[2][-1] = (outputs[2][-1] + 1) % TINY.vocab_size  # the last one: no later token is judged after it
    assert disagreement(model, PROMPTS, outputs) == 1 / 48


def test_mixed_decoding_disagrees_while_lossless_does_not(model: Zaya) -> None:
    runs = {w: DecodingConfig("two_forward", draft_tokens=5, mixing_weight=w) for w in (1.0, 0.1)}
    shares = {
        w: disagreement(model, PROMPTS, generate(model, PROMPTS, run, max_new_tokens=16).tokens)
        for w, run in runs.items()
    }
    assert shares[1.0] == 0
    assert shares[0.1] > 0.2


def test_likelihood_is_that_of_a_pass_per_sequence(model: Zaya) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(40) for _ in range(rng.randrange(1, 9))] for _ in range(19)]  # more than one batch
    outputs = [[rng.randrange(40) for _ in range(rng.randrange(0, 9))] for _ in range(19)]
    nats = []
    for prompt, output in zip(prompts, outputs, strict=True):
        log_p = torch.log_softmax(model.logits(torch.tensor([prompt + output]))[0], -1)
        nats += [-float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(output)]
    assert negative_log_likelihood(model, prompts, outputs) == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_a_model_that_knows_nothing_pays_the_log_of_the_vocabulary(model: Zaya) -> None:
    flat = random_model(TINY, seed=3)
    flat.model.embed_tokens.weight.zero_()
    assert negative_log_likelihood(flat.freeze(), [[1]], [[2, 3]]) == pytest.approx(math.log(40), rel=1e-6)


def test_exact_match_asks_for_the_answer_line_only() -> None:
    problems = [problem_of("addition", seed) for seed in range(10)]
    outputs = [p.solution for p in problems]
    outputs[0], outputs[1] = "", outputs[1] + "0"
    found = exact_match(problems, outputs)
    assert (found.value, found.count) == (0.8, 10)
    assert found.low < 0.8 < found.high


def test_wilson_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(1)
    for share in (0.05, 0.5, 0.9):
        covered = 0
        for _ in range(1000):
            found = wilson(sum(rng.random() < share for _ in range(40)), 40)
            covered += found.low <= share <= found.high
        assert 0.92 <= covered / 1000 <= 0.985
    assert wilson(0, 5).low == 0 and wilson(5, 5).high == 1
    assert wilson(0, 5).high > 0.3  # five failures prove little


def test_bootstrap_shrinks_with_the_problems_and_holds_the_value() -> None:
    values = [float(i % 7) for i in range(700)]

    def mean(count: int) -> float:
        found = bootstrap(lambda index: sum(values[i] for i in index) / len(index), count)
        assert found.low < found.value < found.high
        return found.high - found.low

    assert 3 < mean(28) / mean(700) < 8  # about the square root of 25


def test_impossible_questions_are_refused(model: Zaya) -> None:
    with pytest.raises(UserError, match="at least one token"):
        disagreement(model, [[1]], [[]])
    with pytest.raises(UserError, match="prompt 0 is empty"):
        disagreement(model, [[]], [[1]])
    with pytest.raises(UserError, match="one output per prompt"):
        negative_log_likelihood(model, [[1]], [])
    with pytest.raises(UserError, match="at least one trial"):
        wilson(0, 0)
