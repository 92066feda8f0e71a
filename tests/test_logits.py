"""Stored logits: what a trace says about its tokens, and acceptance predicted from it against what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import acceptance
from hardware.files import UserError
from runtime.checkpoint import save_model
from runtime.config import DecodingConfig
from runtime.layout import causal
from runtime.logits import (
    StoredLogits,
    collect,
    expected_acceptance,
    histogram_from_acceptance,
    kl_divergence,
    load_logits,
    probabilities,
    save_logits,
    total_variation,
)
from runtime.model.zaya import Zaya
from runtime.samplers import advance
from runtime.samplers.acceptance import Draft, Randomness
from runtime.samplers.state import Decode, TraceStep
from tests.models import TINY, noisy_model, random_ids

K = 5


@pytest.fixture(scope="module")
def model() -> Zaya:
    """Sharp logits, so that drafts and targets are far from uniform and still overlap."""
    return noisy_model(TINY, 3)


@torch.inference_mode()
def decode(
    model: Zaya, decoding: DecodingConfig, *, rows: int, steps: int, seed: int = 0
) -> tuple[list[TraceStep], list[list[int]]]:
    """Steps of a sampler from random prompts of 4 tokens: the trace and each request's committed tokens."""
    prompts = random_ids(rows, 4, TINY.vocab_size - 1, seed)
    cache = model.new_cache(rows, 5 + steps * (K + 1) + decoding.slots, decoding.slots)
    model.forward(prompts[:, :-1], causal(3), cache)
    cache.advance([3] * rows)
    trace: list[TraceStep] = []
    state = Decode(model, cache, decoding, prompts[:, -1:], Randomness(seed, rows), list(range(rows)), trace=trace)
    outputs: list[list[int]] = [[] for _ in range(rows)]
    for _ in range(steps):
        for sequence, tokens in zip(state.sequences, advance(state), strict=True):
            outputs[sequence] += tokens
    return trace, outputs


def two_forward(temperature: float, draft_temperature: float, **more: float) -> DecodingConfig:
    return DecodingConfig(
        "two_forward",
        K,
        temperature=temperature,
        draft_temperature=draft_temperature,
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def stochastic(model: Zaya) -> StoredLogits:
    """Some thousand drafts drawn at 1.3 and judged at 0.7."""
    decoding = two_forward(0.7, 1.3)
    return collect(decode(model, decoding, rows=128, steps=14)[0], decoding)


def error(stored: StoredLogits, expected: torch.Tensor) -> tuple[float, float]:
    """Observed minus expected acceptance share, and the standard deviation of the observed one."""
    found = stored.accepted.double()
    deviation = float((expected * (1 - expected)).sum().sqrt()) / len(found)
    return float(found.mean() - expected.mean()), deviation


def test_acceptance_is_what_the_logits_say(stochastic: StoredLogits) -> None:
    predicted = stochastic.expected_acceptance()
    off, deviation = error(stochastic, predicted)
    assert len(predicted) > 2000 and 0.05 < predicted.mean() < 0.95
    assert abs(off) < 4 * deviation
    again = expected_acceptance(stochastic.draft, stochastic.target[stochastic.row], 0.7, 1.3)
    torch.testing.assert_close(predicted, again)


@pytest.mark.parametrize("wrong", ["ratio at the argmax", "target at the draft", "other temperature", "mean ratio"])
def test_a_wrong_formula_is_seen(stochastic: StoredLogits, wrong: str) -> None:
    """So that the test above can fail: formulas that are close to the right one, and seen in public code."""
    row, token = stochastic.target[stochastic.row], stochastic.draft_token[:, None]
    p, q = probabilities(row, 0.7), probabilities(stochastic.draft, 1.3)
    best = q.argmax(-1, keepdim=True)
    expected = {
        "ratio at the argmax": (p / q).gather(-1, best).clamp(max=1)[:, 0],
        "target at the draft": p.gather(-1, token)[:, 0],
        "other temperature": expected_acceptance(stochastic.draft, row, 1.3, 1.3),
        "mean ratio": (p / q).clamp(max=1).mean(-1),
    }[wrong]
    off, deviation = error(stochastic, expected)
    assert abs(off) > 6 * deviation


def test_the_histogram_follows_from_the_positions(stochastic: StoredLogits) -> None:
    observed = histogram_from_acceptance(stochastic, stochastic.accepted)
    predicted = histogram_from_acceptance(stochastic, stochastic.expected_acceptance())
    counts = [0] * (K + 1)
    begins = (stochastic.place == 0).nonzero()[:, 0].tolist()
    for begin, end in zip(begins, [*begins[1:], len(stochastic.place)], strict=True):
        counts[end - begin - 1] += 1
    assert observed == pytest.approx([n / stochastic.steps for n in counts])
    assert sum(predicted) == pytest.approx(1) and len(predicted) == K + 1
    assert predicted == pytest.approx(observed, abs=4 * (0.25 / stochastic.steps) ** 0.5)


@pytest.mark.parametrize("mixing_weight", [1.0, 0.5])
def test_argmax_drafts_pass_with_the_targets_probability(model: Zaya, mixing_weight: float) -> None:
    decoding = two_forward(0.7, 0.0, mixing_weight=mixing_weight)
    stored = collect(decode(model, decoding, rows=64, steps=8)[0], decoding)
    p = probabilities(stored.target[stored.row], 0.7)
    torch.testing.assert_close(stored.expected_acceptance(), p.gather(-1, stored.draft_token[:, None])[:, 0])
    off, deviation = error(stored, stored.expected_acceptance())
    assert abs(off) < 4 * deviation


def test_greedy_acceptance_is_certain(model: Zaya) -> None:
    decoding = two_forward(0.0, 0.0)
    stored = collect(decode(model, decoding, rows=32, steps=6)[0], decoding)
    assert torch.equal(stored.expected_acceptance(), stored.accepted.double())
    assert 0 < int(stored.accepted.sum()) < len(stored.accepted)


@pytest.mark.parametrize("sampler", ["autoregressive", "two_forward"])
def test_every_token_has_its_row(model: Zaya, sampler: str) -> None:
    """Greedy: a token is the argmax of its row, and the row is that of a causal pass over the whole output."""
    decoding = DecodingConfig(sampler, K)  # type: ignore[arg-type]
    trace, outputs = decode(model, decoding, rows=3, steps=4)
    stored = collect(trace, decoding)
    prompts = random_ids(3, 4, TINY.vocab_size - 1, 0)
    for request, tokens in enumerate(outputs):
        rows = stored.of(request)
        assert rows.argmax(-1).tolist() == tokens
        whole = model.logits(torch.cat([prompts[request], torch.tensor(tokens)])[None])[0, 3:-1]
        torch.testing.assert_close(rows, whole, atol=1e-4, rtol=1e-4)
    assert len(stored.row) == 0 if sampler == "autoregressive" else len(stored.row) > 0
    lengths = [1, 3, 0]
    cut = collect(trace, decoding, lengths)
    assert [len(cut.of(i)) for i in range(3)] == lengths
    for request, length in enumerate(lengths):
        assert torch.equal(cut.of(request), stored.of(request)[:length])
    assert bool((cut.row < 4).all())


def test_a_draft_counts_up_to_its_length() -> None:
    """Of rows of K = 3 drafts, one of 3 all accepted, one of 1 accepted, one of 0, one rejected at its second."""
    logits = torch.randn(4, 4, 7)
    draft = Draft(
        torch.zeros(4, 3, dtype=torch.int64), torch.randn(4, 3, 7), torch.zeros(3), torch.tensor([3, 1, 0, 2])
    )
    stored = collect([TraceStep([0, 1, 2, 3], logits, [4, 2, 1, 2], draft)], two_forward(1.0, 0.0))
    assert stored.accepted.tolist() == [True, True, True, True, True, False]
    assert stored.place[stored.row].tolist() == [0, 1, 2, 0, 0, 1]
    assert stored.request[stored.row].tolist() == [0, 0, 0, 1, 3, 3]
    assert histogram_from_acceptance(stored, stored.accepted) == pytest.approx([0.25, 0.5, 0, 0.25])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 1.0]))
def test_distances_obey_their_laws(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(2, 3, 6, generator=generator) * 2 for _ in range(3))
    near = total_variation(a, b, temperature)
    assert near.shape == (2, 3) and near.dtype == torch.float64
    assert torch.equal(near, total_variation(b, a, temperature))
    assert not total_variation(a, a, temperature).any() and not kl_divergence(a, a, temperature).any()
    both = total_variation(a, c, temperature) + total_variation(c, b, temperature)
    assert bool((near <= both + 1e-12).all() and (near >= 0).all() and (near <= 1 + 1e-12).all())
    # Pinsker: TV <= sqrt(KL / 2)
    assert bool((near <= (kl_divergence(a, b, temperature) / 2).sqrt() + 1e-9).all())
    if temperature == 0:
        differs = (a.argmax(-1) != b.argmax(-1)).double()
        assert torch.equal(near, differs)
        assert torch.equal(kl_divergence(a, b, 0.0).isinf(), differs.bool())


def test_known_distances() -> None:
    a, b = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert float(total_variation(a, b, 1.0)) == pytest.approx(0.4)
    assert float(kl_divergence(a, b, 1.0)) == pytest.approx(0.5108256)
    certain = torch.tensor([0.0, -torch.inf])
    assert float(kl_divergence(certain, a, 1.0)) == pytest.approx(0.6931472)
    assert float(kl_divergence(a, certain, 1.0)) == torch.inf
    with pytest.raises(UserError, match="temperature >= 0"):
        total_variation(a, b, -1.0)


def test_stored_logits_come_back(stochastic: StoredLogits, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    save_logits(stochastic, path, {"model_hash": "abc"})
    found, origin = load_logits(path)
    assert origin == {"model_hash": "abc"} and found.decoding == stochastic.decoding
    for name in ("target", "request", "place", "draft", "draft_temperature", "draft_token", "row", "accepted"):
        assert torch.equal(getattr(found, name), getattr(stochastic, name)), name
    other = tmp_path / "other.safetensors"
    other.write_bytes(path.read_bytes().replace(b"ridgepoint-logits-1", b"ridgepoint-logits-0"))
    with pytest.raises(UserError, match="holds no stored logits"):
        load_logits(other)
    other.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot read"):
        load_logits(other)
    with pytest.raises(UserError, match="no step"):
        collect([], DecodingConfig())


def test_the_program_compares_every_setting(
    model: Zaya, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tmp_path / "model")
    monkeypatch.setattr(acceptance, "NEW_TOKENS", 24)
    code = acceptance.main(
        ["--model", str(tmp_path / "model"), "--positions", "400", "--logits", str(tmp_path), "--json"]
    )
    document = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in document["runs"]] == list(acceptance.SETTINGS)
    assert code == (0 if document["held"] else 1)
    for run in document["runs"]:
        assert run["overall"]["judged"] >= 400 and abs(run["deviations"]) < 4
        assert sum(place["judged"] for place in run["by_position"]) == run["overall"]["judged"]
        assert run["overall"]["low"] <= run["overall"]["observed"] <= run["overall"]["high"]
    assert len(list(tmp_path.glob("*.safetensors"))) == len(acceptance.SETTINGS)
