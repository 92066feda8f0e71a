"""The reproduction: what remains of the headline follows the laws of each effect, and the measured ratios are there."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from benchmarks.headline import BATCH, CONTEXT, DEVICES, SAMPLERS, measured_pairs, settings, step_costs
from benchmarks.reproduction import main
from benchmarks.svg import Dot, Panel, figure


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("device", sorted(DEVICES))
def test_each_effect_has_its_law(device: str, sampler: str) -> None:
    batch, context = np.array([1.0, 8.0, 64.0])[:, None], np.array([1024.0, 16384.0])[None, :]
    costs = step_costs(*settings(device), SAMPLERS[sampler], batch, context)
    there = ~np.isnan(costs.kv)
    assert there[0].all() and (np.isnan(costs.engine) == ~there).all()
    read = np.broadcast_to(costs.experts, costs.kv.shape)[there]
    assert (read > 1).all()  # 17 slots read more experts than one
    assert (costs.kv[there] > 1).all() and (costs.kv[there] < 1.001 * read).all()  # one reading of the cache
    assert (costs.kv[:2, 1] < costs.kv[:2, 0]).all()  # and weighs more in longer contexts
    if sampler == "two_forward":
        assert costs.forwards[there] == pytest.approx(2 * costs.kv[there], rel=0.01)  # the draft reads as much
    else:
        assert (costs.forwards[there] > costs.kv[there]).all()  # more slots, and the LM head again
    assert (costs.arithmetic[there] > 0.9 * costs.forwards[there]).all()
    assert costs.experts[0, 0] > 2 * costs.experts[2, 0]  # at batch 64 every expert is read anyway


def test_a_cost_without_experts_is_that_of_reading_the_weights_again() -> None:
    """With every expert read by any token, a block costs no more weights than a single slot, but for embeddings."""
    from dataclasses import replace

    from perfmodel.experts import ExpertCoverage

    ideal, real = (replace(at, coverage=ExpertCoverage("all")) for at in settings("h100-sxm"))
    costs = step_costs(ideal, real, SAMPLERS["two_forward"], np.array(1.0), np.array(1024.0))
    assert float(costs.experts) == pytest.approx(1, rel=1e-3) and float(costs.forwards) == pytest.approx(2, rel=1e-3)


def test_the_published_pairs() -> None:
    pairs = {p.row: p for p in measured_pairs()}
    first = pairs["mt5k-greedy-h100-tf-b1"]
    assert first.ratio == pytest.approx(207.554 / 79.723) and first.context == 2500
    assert first.step_cost == pytest.approx(7.562 / first.ratio)
    assert pairs["t05-h100-sf-P4"].decoding.proposal_levels == (0, 4, 7, 11)
    assert pairs["t05-h100-sf-P4"].ratio == pytest.approx(1055 / 1011)
    assert len(pairs) >= 10 and {p.hardware for p in pairs.values()} == set(DEVICES)
    assert "10k-off-h100-tf-b8" not in pairs  # its series has no autoregressive row
    assert all(p.step_cost > 1 for p in pairs.values())
    errors = [abs(p.predicted_ratio / p.ratio - 1) for p in pairs.values()]
    assert sorted(errors)[len(errors) // 2] < 0.2  # each throughput by a fit that had not seen its series


def test_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["table"]) == len(DEVICES) * len(SAMPLERS) * 2 * len(BATCH) * len(CONTEXT)
    for row in document["table"]:
        assert row["after_kernels"] is None or 0 < row["after_kernels"] < row["tokens_per_step"]
    lossless, mixed = (
        [r["after_kernels"] for r in document["table"] if r["headline"] == claim and r["after_kernels"]]
        for claim in ("lossless", "logit mixing")
    )
    assert np.array(mixed) / np.array(lossless) == pytest.approx(7.7 / 4.6, rel=1e-3)
    drawn = ET.parse(tmp_path / "figure.svg").getroot()
    circles = [e for e in drawn.iter() if e.tag.endswith("circle")]
    with (tmp_path / "devices.csv").open() as stream:
        devices = list(csv.DictReader(stream))
    assert {d["hardware"] for d in devices} >= set(DEVICES)
    for d in devices:
        left, pays = float(d["most_remaining"]), int(d["cells_faster_than_autoregressive"])
        assert left < float(d["tokens_per_step"]) and (pays > 0) == (left > 1) and pays <= int(d["cells"])
    assert len(circles) == 2 * (1 + len(document["measured"]))  # one of a kind in the legend
    assert {p.name for p in tmp_path.iterdir()} == {
        "table.csv",
        "measured.csv",
        "devices.csv",
        "figures.md",
        "figure.svg",
    }


def test_a_line_is_interrupted_where_nothing_is_known() -> None:
    panel = Panel(
        "a < b",
        {"one": [(1, 1.0), (2, 2.0), (4, None), (8, 1.0), (16, 0.5)]},
        [Dot(2, 1.5, "x & y"), Dot(4, 1.0, "z", filled=False)],
    )
    root = ET.fromstring(figure([[panel]], "t", "x", "y", "dots"))
    lines = [e for e in root.iter() if e.tag.endswith("polyline") and e.get("stroke-width") == "2"]
    assert [len(e.get("points", "").split()) for e in lines] == [2, 2]
    assert "a < b" in "".join(root.itertext())
