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
from runtime.logits import StoredLogits, collect
from runtime.model.zaya import Zaya
from runtime.quality import disagreement, exact_match, likeness, negative_log_likelihood
from runtime.samplers.state import TraceStep

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


def traced(model: Zaya, decoding: DecodingConfig) -> tuple[list[list[int]], StoredLogits]:
    """12 tokens for every prompt, and what they were drawn from."""
    trace: list[TraceStep] = []
    outputs = generate(model, PROMPTS, decoding, max_new_tokens=12, trace=trace).tokens
    return outputs, collect(trace, decoding, [len(o) for o in outputs])


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


# Likeness to the model's own distribution


def test_lossless_sampling_has_no_distance_and_mixing_has(model: Zaya) -> None:
    distances = {}
    for w in (1.0, 0.3):
        decoding = DecodingConfig("two_forward", draft_tokens=5, mixing_weight=w, temperature=0.7)
        outputs, stored = traced(model, decoding)
        found = likeness(model, PROMPTS, outputs, stored)
        assert found.temperature == 0.7
        assert found.total_variation is not None and found.kl_divergence is not None
        distances[w] = found.total_variation.value, found.kl_divergence.value
    assert max(distances[1.0]) < 1e-5
    assert min(distances[0.3]) > 0.02
    assert distances[0.3][0] <= (distances[0.3][1] / 2) ** 0.5 * 1.01  # Pinsker, which holds for the mean too


def test_distances_are_those_of_each_token_by_hand(model: Zaya) -> None:
    decoding = DecodingConfig("two_forward", draft_tokens=5, mixing_weight=0.3, temperature=0.7)
    outputs, stored = traced(model, decoding)
    found = likeness(model, PROMPTS, outputs, stored)
    variation, nats, entropy = [], [], []
    for i, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
        logits = model.logits(torch.tensor([prompt + output]))[0, len(prompt) - 1 : -1]
        drawn = stored.of(i)
        assert drawn.shape == logits.shape
        variation.append((torch.softmax(drawn / 0.7, -1) - torch.softmax(logits / 0.7, -1)).abs().sum(-1) / 2)
        entropy.append(torch.distributions.Categorical(logits=logits).entropy())
        nats.append(-torch.log_softmax(logits, -1).gather(1, torch.tensor(output)[:, None])[:, 0])
    assert found.total_variation is not None
    assert found.total_variation.value == pytest.approx(float(torch.cat(variation).mean()), rel=1e-4)
    assert found.entropy.value == pytest.approx(float(torch.cat(entropy).mean()), rel=1e-4)
    assert found.negative_log_likelihood.value == pytest.approx(float(torch.cat(nats).mean()), rel=1e-4)


def test_greedy_outputs_are_compared_at_temperature_one(model: Zaya) -> None:
    outputs, stored = traced(model, DecodingConfig())
    found = likeness(model, PROMPTS, outputs, stored)
    assert found.temperature == 1 and found.disagreement.value == 0
    assert found.total_variation is not None and found.total_variation.value < 1e-5


def test_sampling_from_the_model_costs_its_entropy_and_a_loop_costs_less(model: Zaya) -> None:
    """Averaged over many draws, the likelihood of tokens drawn at temperature 1 is the entropy; greedy pays less."""
    prompts = [[i % 30] for i in range(96)]
    drawn = generate(model, prompts, DecodingConfig(temperature=1.0), max_new_tokens=24).tokens
    sampled = likeness(model, prompts, drawn)
    assert sampled.total_variation is None
    assert abs(sampled.negative_log_likelihood.value - sampled.entropy.value) < 0.05
    greedy = likeness(model, prompts, generate(model, prompts, DecodingConfig(), max_new_tokens=24).tokens)
    assert greedy.negative_log_likelihood.value < greedy.entropy.value - 0.3
    assert sampled.repetition is not None and greedy.repetition is not None
    assert sampled.repetition.value < 0.01 < greedy.repetition.value  # and the repetition says why


def test_logits_of_other_outputs_are_refused(model: Zaya) -> None:
    outputs, stored = traced(model, DecodingConfig())
    with pytest.raises(UserError, match="output 2 has 3 and 12 rows"):
        likeness(model, PROMPTS, [*outputs[:2], [1, 2, 3], outputs[3]], stored)


def test_impossible_questions_are_refused(model: Zaya) -> None:
    with pytest.raises(UserError, match="at least one token"):
        disagreement(model, [[1]], [[]])
    with pytest.raises(UserError, match="prompt 0 is empty"):
        disagreement(model, [[]], [[1]])
    with pytest.raises(UserError, match="one output per prompt"):
        negative_log_likelihood(model, [[1]], [])
