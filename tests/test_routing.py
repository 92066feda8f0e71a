"""Routing facts: counted as the runtime counts them, read strictly, and used by the performance model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import routing as program
from hardware.files import UserError
from perfmodel.experts import ExpertCoverage, coverage_of, parse_coverage
from runtime.checkpoint import save_model
from runtime.config import DecodingConfig
from runtime.layout import causal
from runtime.model.zaya import Zaya
from runtime.route_recording import record
from runtime.routing import (
    FORMAT,
    Routes,
    RoutingFacts,
    batches_of,
    block_of,
    distinct_experts,
    point_of,
    read_routing,
    write_routing,
)
from runtime.samplers import advance
from runtime.samplers.acceptance import Randomness
from runtime.samplers.state import Decode
from tests.models import TINY, noisy_model, random_ids

EXPERTS = TINY.num_experts
COMMITTED = Path(__file__).parent.parent / "measurements" / "zaya-nano" / "routing.json"


@pytest.fixture(scope="module")
def model() -> Zaya:
    return noisy_model(TINY, 5)


def blocks(repeat: float, *, sequences: int = 400, slots: int = 8, experts: int = 6, seed: int = 0) -> Routes:
    """A block has a favourite expert, which each token takes with probability `repeat`, else any: rho = repeat^2."""
    rng = np.random.default_rng(seed)
    favourite = rng.integers(0, experts, (2, sequences, 1))
    free = rng.integers(0, experts, (2, sequences, slots))
    return np.where(rng.random(free.shape) < repeat, favourite, free)


@pytest.mark.parametrize("sampler", ["autoregressive", "two_forward", "single_forward"])
def test_what_is_recorded_is_what_the_runtime_counts(model: Zaya, sampler: str) -> None:
    """The routes of 6 sequences, taken in pairs, against a count that the runtime made of each pair by itself."""
    decoding = DecodingConfig(sampler, 3)  # type: ignore[arg-type]
    rows = random_ids(6, 9, TINY.vocab_size - 1, 1).tolist()
    recorded = record(model, rows, decoding)
    for begin in (0, 2, 4):
        counters = counted(model, rows[begin : begin + 2], decoding)
        assert set(counters) == set(recorded)
        for kind, routes in recorded.items():
            pair = routes[:, begin : begin + 2].reshape(TINY.num_hidden_layers, -1)
            assert distinct_experts(pair, EXPERTS).tolist() == counters[kind]


@torch.inference_mode()
def counted(model: Zaya, rows: list[list[int]], decoding: DecodingConfig) -> dict[str, list[float]]:
    """Distinct experts per layer and kind of forward in a step (of single_forward in the second one)."""
    cache = model.new_cache(len(rows), 9 + 2 * decoding.slots, decoding.slots)
    tokens = torch.tensor(rows)
    model.forward(tokens[:, :-1], causal(8), cache)
    cache.advance([8] * len(rows))
    decode = Decode(model, cache, decoding, tokens[:, -1:], Randomness(0, len(rows)), list(range(len(rows))))
    for _ in range(2 if decoding.sampler == "single_forward" else 1):
        decode.counters = {}
        advance(decode)
    return {kind: counter.experts_per_layer() for kind, counter in decode.counters.items()}


def test_routes_do_not_depend_on_neighbours(model: Zaya) -> None:
    """What taking sequences in groups rests on."""
    rows = random_ids(5, 9, TINY.vocab_size - 1, 2).tolist()
    decoding = DecodingConfig("two_forward", 4)
    together = record(model, rows, decoding)
    for index, row in enumerate(rows):
        for kind, routes in record(model, [row], decoding).items():
            assert np.array_equal(routes[:, 0], together[kind][:, index])


def test_distinct_experts_are_those_of_a_set() -> None:
    rng = np.random.default_rng(0)
    routes = rng.integers(0, EXPERTS + 1, (3, 7, 5))
    expected = [[len(set(row.tolist()) - {EXPERTS}) for row in layer] for layer in routes]
    assert distinct_experts(routes, EXPERTS).tolist() == expected


def test_points_obey_their_laws() -> None:
    independent, tied = blocks(0.0), blocks(0.9)
    for routes in (independent, tied):
        found = [point_of("verify", routes, b, 6) for b in batches_of(400, 64)]
        assert [p.batch for p in found] == [1, 2, 4, 8, 16, 32, 64]
        distinct = [p.distinct for p in found]
        assert distinct == sorted(distinct) and distinct[-1] <= 6
        for p in found:
            assert p.distinct <= min(6, p.tokens) and p.low <= p.distinct <= p.high
            assert np.mean(p.per_layer) == pytest.approx(p.distinct, abs=1e-4)
    for batch in (1, 2, 8):
        uniform = float(ExpertCoverage().distinct(batch, 8, 6))
        loose, tight = (point_of("verify", routes, batch, 6) for routes in (independent, tied))
        assert loose.low - 0.05 <= uniform <= loose.high + 0.05
        assert tight.high < loose.low
    with pytest.raises(UserError, match="at least 512 sequences, but got 400"):
        point_of("verify", independent, 256, 6)


@pytest.mark.parametrize("repeat", [0.0, 0.5, 0.8])
def test_the_correlation_is_the_planted_one(repeat: float) -> None:
    found = block_of("draft", blocks(repeat), 6)
    assert found.correlation is not None and found.low is not None and found.high is not None
    assert found.correlation == pytest.approx(repeat**2, abs=0.04)
    assert found.low < found.correlation < found.high
    assert found.skip_share == 0 and all(sum(layer) == pytest.approx(1, abs=1e-4) for layer in found.load)


def test_uneven_loads_alone_are_no_correlation() -> None:
    """Everybody prefers the same expert: two tokens of a block agree often, but no more than two of different ones."""
    rng = np.random.default_rng(0)
    found = block_of("verify", rng.choice(4, (2, 400, 8), p=[0.7, 0.1, 0.1, 0.1]), 4)
    assert found.correlation == pytest.approx(0, abs=0.02)
    assert found.load[0][0] == pytest.approx(0.7, abs=0.03)


def test_skipped_tokens_count_nowhere() -> None:
    routes = blocks(0.5)
    routes[:, :, ::2] = 6
    found = block_of("draft", routes, 6)
    assert found.skip_share == pytest.approx(0.5)
    assert found.correlation == pytest.approx(0.25, abs=0.04)
    assert point_of("draft", routes, 1, 6).distinct == pytest.approx(
        point_of("draft", routes[:, :, 1::2], 1, 6).distinct
    )
    assert block_of("decode", routes[:, :, :1], 6).correlation is None


@pytest.fixture(scope="module")
def facts() -> RoutingFacts:
    recorded: list[Any] = [("decode", blocks(0.0, slots=1)), ("draft", blocks(0.8)), ("verify", blocks(0.4))]
    points = tuple(program.points_of(recorded, 6))
    found = tuple(block_of(kind, routes, 6) for kind, routes in recorded)
    return RoutingFacts(FORMAT, "made up", "abc", "none", "none", "2026-01-01", 2, 6, points, found, {"draft": 0.6}, ())


def test_facts_come_back_and_are_read_strictly(facts: RoutingFacts, tmp_path: Path) -> None:
    path = write_routing(facts, tmp_path / "routing.json")
    assert read_routing(path) == facts
    whole = json.loads(path.read_text())
    point = whole["points"][0]
    for change, message in (
        ({"format": "ridgepoint-routing-2"}, "ridgepoint-routing-1"),
        ({"tokens": [1, 2]}, "unknown key 'tokens'"),
        ({"points": []}, "at least one point"),
        ({"points": [point, point]}, "is there twice"),
        ({"points": [{**point, "distinct": 2.0}]}, r"min\(experts, tokens\) = 1"),
        ({"points": [{**point, "per_layer": [1.0]}]}, "must have 2 entries"),
        ({"points": [{**point, "kind": "prefill"}]}, "decode, draft, verify"),
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(UserError, match=message):
            read_routing(path)
    del whole["layers"]
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="missing key 'layers'"):
        read_routing(path)


def test_the_performance_model_reads_what_was_recorded(facts: RoutingFacts, tmp_path: Path) -> None:
    coverage = parse_coverage(f"measured:{write_routing(facts, tmp_path / 'routing.json')}")
    assert coverage == coverage_of(facts) and str(coverage) == "measured"
    for p in facts.points:
        assert coverage.of(p.kind).distinct(p.batch, p.slots, 6) == pytest.approx(p.distinct)
    draft, verify = coverage.of("draft"), coverage.of("verify")
    assert draft.distinct(3, 8, 6) < verify.distinct(3, 8, 6)  # between recorded batches too
    with pytest.raises(UserError, match="measured on a model of 6 experts, but this one has 16"):
        coverage.distinct(1, 1, 16)
    unknown = RoutingFacts(**{**vars(facts), "blocks": facts.blocks[:1]})
    with pytest.raises(UserError, match="nothing of its blocks"):
        coverage_of(unknown)


def test_the_committed_facts_are_reproduced_and_beat_uniform() -> None:
    """What a held-out check in the file says of named coverages, for the kinds whose blocks route together."""
    facts = read_routing(COMMITTED)
    coverage = coverage_of(facts)
    for p in facts.points:
        assert coverage.of(p.kind).distinct(p.batch, p.slots, facts.experts) == pytest.approx(p.distinct)
    errors = {(h.coverage, h.kind): h.mean_absolute_error for h in facts.held_out}
    for kind in ("draft", "verify", "single"):
        assert errors["measured", kind] < errors["uniform", kind]


def test_the_program_records_a_model(
    model: Zaya, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    single = DecodingConfig("single_forward", 2, proposal_levels=(0, 2))
    monkeypatch.setattr(program, "RECORDED", [DecodingConfig(), *program._blocks(2, 5), single])
    monkeypatch.setattr(program, "HELD_OUT", [DecodingConfig(), *program._blocks(3), single])
    save_model(model, tmp_path / "model")
    out = tmp_path / "routing.json"
    assert program.main(["--model", str(tmp_path / "model"), "--sequences", "24", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    facts = read_routing(out)
    assert {(p.kind, p.slots) for p in facts.points} == {
        ("decode", 1), ("draft", 2), ("draft", 5), ("verify", 2), ("verify", 5), ("single", 9)
    }  # fmt: skip
    assert set(facts.fitted_rho) == {"draft", "verify", "single"}
    assert {h.kind for h in facts.held_out} == {"decode", "draft", "verify", "single"}
    one = next(p for p in facts.points if (p.kind, p.batch) == ("decode", 1))
    assert one.distinct == pytest.approx(1 - facts.skip_share("decode", 1), abs=1e-4)
