"""Routes to time experts with: those of a model, or drawn with the loads and correlations that were recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hardware.files import UserError
from runtime.checkpoint import save_model
from runtime.config import DecodingConfig, ModelConfig, replace
from runtime.route_recording import drawn, nearest_block, prefixes, record, route_rows
from runtime.routing import BlockFacts, block_of, read_routing
from tests.models import TINY, noisy_model

FACTS = Path(__file__).parents[1] / "measurements" / "zaya-nano" / "routing.json"
NANO = replace(ModelConfig(), num_experts=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(noisy_model(TINY, 5), folder)
    return folder


@pytest.mark.parametrize(("batch", "slots"), [(1, 1), (4, 1), (1, 5), (3, 5)])
def test_recorded_rows_are_forwards_of_the_model(checkpoint: Path, batch: int, slots: int) -> None:
    """Each row is made of whole sequences of one layer and one kind, and the layers take turns."""
    found = route_rows(f"recorded:{checkpoint}", TINY, batch, slots, rows=8, seed=3)
    assert found.rows.shape == (8, batch * slots)
    model = noisy_model(TINY, 5)
    decoding = DecodingConfig() if slots == 1 else DecodingConfig("two_forward", slots - 1)
    recorded = record(model, prefixes(model, max(batch, 2), 3), decoding)
    kinds = list(recorded.values())
    assert len(kinds) == (1 if slots == 1 else 2)
    for place, row in enumerate(found.rows):
        routes = kinds[place % len(kinds)][place // len(kinds) % TINY.num_hidden_layers]
        sequences = {tuple(sequence) for sequence in routes}
        assert all(tuple(sequence) in sequences for sequence in row.reshape(batch, slots))
    # TINY has another vocabulary than the text that we have.
    assert found.source == f"recorded:{checkpoint} ({decoding.sampler}, behind random tokens)"


def test_a_sampler_records_the_slots_that_it_sends(checkpoint: Path) -> None:
    single = DecodingConfig("single_forward", 3, proposal_levels=(0, 2))
    found = route_rows(f"recorded:{checkpoint}", TINY, 2, single.slots, decoding=single, rows=4)
    assert found.rows.shape == (4, 2 * 12) and "(single_forward" in found.source
    with pytest.raises(UserError, match="single_forward must send the slots, but sends 12, not 5"):
        route_rows(f"recorded:{checkpoint}", TINY, 2, 5, decoding=single)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
def test_drawn_routes_have_the_loads_and_the_correlation(rho: float) -> None:
    load = (0.4, 0.3, 0.1, 0.0, 0.2)  # one expert is never chosen; 0.2 skip
    block = BlockFacts("verify", 6, 100, 0.2, rho, None, None, (rho, rho), (load, load))
    rows = drawn(block, 200, 6, 20)
    routes = rows.reshape(1, 20 * 200, 6)  # both layers are alike
    again = block_of("verify", routes, 4)
    assert again.correlation == pytest.approx(rho, abs=0.03)
    assert again.load[0] == pytest.approx(load, abs=0.02) and again.load[0][3] == 0


def test_layers_take_turns_and_keep_their_own_loads() -> None:
    block = BlockFacts("decode", 1, 100, 0.0, None, None, None, (), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))
    assert [set(row) for row in drawn(block, 5, 1, 4)] == [{0}, {1}, {0}, {1}]


def test_measured_facts_are_those_of_the_nearest_block() -> None:
    facts = read_routing(FACTS)
    assert {nearest_block(facts, slots).slots for slots in (1, 17, 85)} == {1, 17, 85}
    assert nearest_block(facts, 17).kind == "verify" and nearest_block(facts, 18).slots == 17
    found = route_rows(f"measured:{FACTS}", NANO, 4, 18)
    assert found.source == f"measured:{FACTS} (verify of 17)" and found.rows.shape == (64, 72)
    distinct = np.mean([len(set(row) - {8}) for row in route_rows(f"measured:{FACTS}", NANO, 1, 17, rows=200).rows])
    point = next(p for p in facts.points if (p.kind, p.batch, p.slots) == ("verify", 1, 17))
    uniform = np.mean([len(set(row) - {8}) for row in route_rows("uniform", NANO, 1, 17, rows=200).rows])
    # Nearer to what was recorded than uniform routes are, though drawn from loads and one correlation per layer.
    assert abs(distinct - point.distinct) < abs(uniform - point.distinct) / 2


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ("random", "unknown routing 'random'; known: measured:FILE, recorded:MODEL, uniform"),
        ("measured:", "unknown routing 'measured:'"),
        (f"measured:{FACTS}", "as many experts, 16, but zaya-nano has 8"),
        ("recorded:zaya-nano", "as many experts, 16, but zaya-nano has 8"),
        ("recorded:nowhere", "nowhere"),
    ],
)
def test_routes_that_cannot_be_had_are_one_line(routing: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        route_rows(routing, ModelConfig(), 1, 1)
    assert message in str(error.value) and "\n" not in str(error.value)
