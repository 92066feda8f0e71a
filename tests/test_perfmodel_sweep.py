"""Sweeps, break-even maps, their tables and costs: a grid is many predictions, and a boundary is where 1 is crossed."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import sweep_speed
from hardware.files import UserError
from hardware.profile import load_profile
from perfmodel import sweep as sweep_module
from perfmodel.breakeven import HOLDS, SamplerMap, break_even
from perfmodel.contenders import Acceptance, Contender, contenders
from perfmodel.decoding import predict, setting
from perfmodel.economics import economics
from perfmodel.known_acceptance import load_acceptance
from perfmodel.model_spec import load_spec
from perfmodel.sweep import sweep, time_points
from perfmodel.tables import write_table
from runtime.config import DecodingConfig, Workload, replace

SPEC = load_spec("zaya1-8b")
H100, MI300X = load_profile("h100-sxm"), load_profile("mi300x")
IDEAL = setting(SPEC, H100, "bfloat16", engine="ideal-graph")
TWO, SINGLE = DecodingConfig("two_forward"), DecodingConfig("single_forward")
SIZES = st.integers(1, 300)


def speedup_at(contender: Contender, batch: int, context: int) -> float:
    return predict(
        SPEC,
        H100,
        Workload(batch=batch, dtype="bfloat16"),
        contender.decoding,
        context=context,
        acceptance_length=contender.acceptance_length,
        engine="ideal-graph",
    ).speedup_over_autoregressive


@given(batch=SIZES, context=st.integers(1, 20_000), drafts=st.integers(1, 24), single=st.booleans())
@settings(deadline=None, max_examples=25)
def test_a_point_of_a_grid_is_a_prediction(batch: int, context: int, drafts: int, single: bool) -> None:
    """Whatever else lies in the grid."""
    decoding = SINGLE if single else TWO
    grid = sweep(
        IDEAL, decoding, batch=[7, batch], context=[context, 90], draft_tokens=[3, drafts], acceptance_length=2
    )
    row = list(grid.rows())[5]
    assert (row["batch"], row["context"], row["draft_tokens"]) == (batch, context, drafts)
    one = Contender(replace(decoding, draft_tokens=drafts), 2.0)
    if row["fits"]:
        assert row["speedup_over_autoregressive"] == pytest.approx(speedup_at(one, batch, context))
    else:
        with pytest.raises(UserError, match="fit"):
            speedup_at(one, batch, context)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = {"batch": [1, 3, 8, 64, 65], "context": [10, 300, 5000, 40_000], "draft_tokens": [1, 5, 16]}
    whole = sweep(IDEAL, TWO, **axes, acceptance_length=1.5).columns()  # type: ignore[arg-type]
    done: list[int] = []
    for points in (1, 4, 7, 1000):
        monkeypatch.setattr(sweep_module, "CHUNK_POINTS", points)
        done.clear()
        parts = sweep(IDEAL, TWO, **axes, acceptance_length=1.5, progress=done.append).columns()  # type: ignore[arg-type]
        assert sum(done) == 60 and len(done) == (1 if points == 1000 else 20 if points < 6 else 10)
        for name, column in whole.items():
            np.testing.assert_allclose(parts[name], column, rtol=1e-12, err_msg=name)


def test_laws_of_a_grid() -> None:
    """More sequences, cached tokens or drafts never make a step shorter; the bound stays below; rates follow."""
    grid = sweep(
        IDEAL,
        TWO,
        batch=[1, 2, 5, 16, 17, 64, 200],
        context=[1, 100, 1000, 9999],
        draft_tokens=[1, 2, 8, 16],
        acceptance_length=1.7,
    )
    for axis in range(3):
        assert (np.diff(grid.step_seconds, axis=axis) >= -1e-12).all()
        assert (np.diff(grid.bound_step_seconds, axis=axis) >= -1e-15).all()
    assert (grid.bound_step_seconds <= grid.step_seconds).all()
    columns = grid.columns()
    rate = columns["batch"] * 1.7 / columns["step_seconds"]
    assert columns["tokens_per_second"] == pytest.approx(rate)
    assert (np.ptp(grid.autoregressive_step_seconds, axis=2) == 0).all()


def test_settings_of_one_sampler_are_timed_together() -> None:
    chosen = [
        replace(SINGLE, draft_tokens=k, proposal_levels=levels) for k, levels in ((16, None), (16, (0, 4)), (5, (0,)))
    ]
    together = time_points(IDEAL, chosen, np.array([[2.0], [30.0]]), 4000)
    for i, decoding in enumerate(chosen):
        alone = time_points(IDEAL, [decoding], np.array([[2.0], [30.0]]), 4000)
        assert together.step_seconds[:, i] == pytest.approx(alone.step_seconds[:, 0])
        assert together.step_cost[:, i] == pytest.approx(alone.step_cost[:, 0])
    with pytest.raises(UserError, match="differ in K"):
        time_points(IDEAL, [TWO, replace(TWO, temperature=1.0)], 1, 100)
    with pytest.raises(UserError, match="differ in K"):
        time_points(IDEAL, [TWO, SINGLE], 1, 100)


def test_costs_follow_power_and_price() -> None:
    """700 W for an hour at a million tokens an hour; twice the devices at the same rate cost twice as much."""
    hour = economics(H100, 1e6 / 3600)
    assert hour.joules_per_million_tokens == pytest.approx(700 * 3600)
    assert hour.dollars_per_million_tokens == pytest.approx(H100.price_dollars_per_hour)
    two = economics(H100, np.array([1e6 / 3600, 2e6 / 3600]), devices=2)
    assert two.joules_per_million_tokens == pytest.approx([2 * 700 * 3600, 700 * 3600])
    sources = {
        place: text for place, text in H100.sources.items() if place not in ("tdp_watts", "price_dollars_per_hour")
    }
    unknown = dataclasses.replace(H100, tdp_watts=None, price_dollars_per_hour=None, sources=sources)
    assert economics(unknown, 5.0).joules_per_million_tokens is None
    bare = setting(SPEC, unknown, "bfloat16", engine="ideal-graph")
    columns = sweep(bare, TWO, batch=[1], context=[100], draft_tokens=[4], acceptance_length=2).columns()
    assert not [name for name in columns if "per_million" in name]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_tables_round_trip(ending: str, tmp_path: Path) -> None:
    columns = sweep(IDEAL, TWO, batch=[1, 9], context=[100, 777], draft_tokens=[4], acceptance_length=2.5).columns()
    columns["name"] = np.array(["a", "b,c", 'd"', "e"])
    numeric = ("step_seconds", "batch", "speedup_over_autoregressive")
    columns["gap"] = np.array([1.0, np.nan, 1 / 3, 2.0])
    path = write_table(tmp_path / "new" / f"grid{ending}", columns)
    if ending == ".csv":
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        found = {name: [row[name] for row in rows] for name in rows[0]}
        assert [value and float(value) for value in found["gap"]] == [1.0, "", 1 / 3, 2.0]
        numbers = {
            name: list(map(float, found[name])) for name in ("step_seconds", "batch", "speedup_over_autoregressive")
        }
    else:
        found = pyarrow.parquet.read_table(path).to_pydict()
        assert found["gap"] == [1.0, None, 1 / 3, 2.0] and found["fits"] == [True] * 4
        numbers = found
    assert list(found) == list(columns) and found["name"] == ["a", "b,c", 'd"', "e"]
    for name in numeric:
        assert numbers[name] == columns[name].tolist()  # to the last digit
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(UserError, match="must end in"):
        write_table(tmp_path / "grid.txt", columns)


def test_acceptance_of_several_settings() -> None:
    """A length is one setting's; a histogram of K = 4 says what fewer drafts accept; levels are chosen from it."""
    with pytest.raises(UserError, match="that of one setting"):
        contenders(TWO, Acceptance(length=3.0), [4, 8])
    assert contenders(TWO, Acceptance(length=3.0), [8]) == [Contender(replace(TWO, draft_tokens=8), 3.0)]
    counted = Acceptance(histogram=(4, 0, 0, 2, 2))
    found = contenders(TWO, counted, [1, 3, 4])
    assert [c.acceptance_length for c in found] == pytest.approx([1.5, 2.5, 1 + (6 + 8) / 8])
    assert counted.shares("two_forward", 3) == [4, 0, 0, 4]
    assert counted.shares("two_forward", 5) == [4, 0, 0, 2, 2, 0]
    rated = contenders(SINGLE, Acceptance(rates=(0.8,)), [2, 8])
    assert {len(c.decoding.levels) for c in rated if c.decoding.draft_tokens == 2} == {1, 2, 3}
    by_levels = {len(c.decoding.levels): c.acceptance_length for c in rated if c.decoding.draft_tokens == 8}
    assert sorted(by_levels) == [1, 2, 3, 4, 5, 6, 9]
    assert sorted(by_levels.values()) == [by_levels[n] for n in sorted(by_levels)]  # more levels lose fewer tokens
    given_sets = contenders(SINGLE, Acceptance(rates=(0.8,)), [4, 16], [(0, 8), (0, 2), None])
    assert [(c.decoding.draft_tokens, c.decoding.proposal_levels) for c in given_sets] == [
        (4, (0, 2)), (4, None), (16, (0, 8)), (16, (0, 2)), (16, None),
    ]  # fmt: skip
    with pytest.raises(UserError, match="at most draft_tokens = 4"):
        contenders(SINGLE, Acceptance(rates=(0.8,)), [4], [(0, 8)])
    with pytest.raises(UserError, match="exactly one of"):
        contenders(TWO, Acceptance(), [4])


def test_a_known_acceptance_says_what_it_was_measured_of() -> None:
    published = Acceptance(known=load_acceptance("aime25-off"))
    found = {c.decoding.draft_tokens: c.acceptance_length for c in contenders(TWO, published, [4, 16])}
    assert found == pytest.approx({4: 1.44, 16: 9.68}, rel=1e-3)
    (dense, *sparse) = contenders(SINGLE, published, [16])
    assert dense.acceptance_length == pytest.approx(10.19, rel=1e-3)
    assert sparse and all(c.acceptance_length < dense.acceptance_length for c in sparse)
    with pytest.raises(UserError, match="K is 64"):
        contenders(TWO, published, [64])
    with pytest.raises(UserError, match="denoising"):
        contenders(DecodingConfig("denoising", verify=True), published, [16])
    with pytest.raises(UserError, match="beside it"):
        Acceptance(length=3.0, known=load_acceptance("aime25-off"))


@pytest.fixture(scope="module")
def two_map() -> SamplerMap:
    tried = contenders(TWO, Acceptance(rates=(0.7,)), [2, 4, 8])
    return break_even(IDEAL, tried, [1, 8, 64, 512], [1000, 8000, 100_000])


def test_a_cell_is_the_best_setting(two_map: SamplerMap) -> None:
    for i, batch in enumerate(two_map.batch):
        for j, context in enumerate(two_map.context):
            if not two_map.fits[i, j]:
                assert np.isnan(two_map.speedup[i, j])
                continue
            every = [speedup_at(c, batch, context) for c in two_map.contenders]
            assert two_map.speedup[i, j] == pytest.approx(max(every))
            assert every[two_map.best[i, j]] == pytest.approx(max(every))
            length = two_map.contenders[two_map.best[i, j]].acceptance_length
            assert two_map.step_cost[i, j] == pytest.approx(length / max(every))
    assert not two_map.fits[-1, -1] and two_map.fits[0].all()


def test_a_boundary_is_where_the_speedup_crosses_one(two_map: SamplerMap) -> None:
    """Inside a stretch it pays and one step outside it does not, for the best of the settings; both kinds occur."""

    def best(batch: int, context: int) -> float:
        fitting = []
        for c in two_map.contenders:
            with contextlib.suppress(UserError):  # the widest draft no longer fits where a shorter one does
                fitting.append(speedup_at(c, batch, context))
        return max(fitting, default=0.0)

    crossings = 0
    for context, stretches in zip(two_map.context, two_map.by_batch, strict=True):
        for s in stretches:
            assert best(s.first, context) > 1 and best(s.last, context) > 1
            if s.first > two_map.batch[0]:
                assert best(s.first - 1, context) <= 1
                crossings += 1
            if s.ends_by == "break-even":
                assert best(s.last + 1, context) <= 1
                crossings += 1
            elif s.ends_by == "memory":
                assert best(s.last + 1, context) == 0
            else:
                assert s.last == two_map.batch[-1]
    for batch, stretches in zip(two_map.batch, two_map.by_context, strict=True):
        for s in stretches:
            assert best(batch, s.last) > 1
            if s.first > two_map.context[0]:
                assert best(batch, s.first - 1) <= 1
                crossings += 1
            if s.ends_by == "memory":
                assert best(batch, s.last + 1) == 0
    assert crossings >= 2
    pays = np.array([[any(s.first <= b <= s.last for s in row) for row in two_map.by_batch] for b in two_map.batch])
    assert (pays == two_map.pays).all()


def test_what_remains_of_a_headline(two_map: SamplerMap) -> None:
    """No more than the tokens of a step, and only of settings that can commit as many."""
    half, whole = two_map.headlines
    assert half.tokens_per_step == 4.6
    remaining = half.remaining[two_map.fits]
    assert (remaining < 4.6).all() and not half.holds.any()  # two forwards cost more than one
    able = [i for i, c in enumerate(two_map.contenders) if c.decoding.draft_tokens + 1 >= 4.6]
    cheapest = min(two_map.contenders[i].acceptance_length / speedup_at(two_map.contenders[i], 8, 8000) for i in able)
    assert half.remaining[1, 1] == pytest.approx(4.6 / cheapest)
    assert len(able) == 2 and whole.tokens_per_step == 7.7 and not np.isnan(whole.remaining[0, 0])
    tried = contenders(SINGLE, Acceptance(length=4.0), [16], [(0,)])
    long = break_even(IDEAL, tried, [8], [120_000], headlines=(1.5, 30.0))
    assert long.headlines[0].reached.all() and np.isnan(long.headlines[1].remaining).all()
    assert long.headlines[0].holds.all() == (long.step_cost <= 1 / HOLDS).all()


@pytest.mark.parametrize(
    ("batch", "context", "part"),
    [([], [100], "batch must have entries"), ([1], [0], "context must have"), ([1], [200_000], "131072")],
)
def test_maps_refuse_impossible_axes(batch: list[int], context: list[int], part: str) -> None:
    with pytest.raises(UserError, match=part):
        break_even(IDEAL, contenders(TWO, Acceptance(length=3.0), [8]), batch, context)


def test_the_benchmark_counts_operating_points(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every point once: batch x context, times K where a sampler drafts. Its speed is not judged here."""
    monkeypatch.setattr(sweep_speed, "GRIDS", {"small": (range(1, 41), range(500, 50_001, 500))})
    monkeypatch.setattr(sweep_speed, "predict_seconds", lambda model, hardware, repeats: [0.5] * repeats)
    assert sweep_speed.main(["--hardware", "h100-sxm", "--repeats", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    for found in document["sweeps"]:
        assert found["points"] == 40 * 100 * (1 if found["sampler"] == "autoregressive" else 16)
        assert len(found["seconds"]) == 3
    assert document["predict"]["seconds_median"] == 0.5 and document["commit"]
