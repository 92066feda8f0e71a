"""Recording a table and comparing searches on it: what is measured, kept and resumed; what a comparison says."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from autotune.objective import Outputs
from autotune.replay import Head, Recorded, Recording, Replay, read_recording, write_recording
from autotune.results import Subject
from autotune.space import Candidate, Space, decoding_space
from benchmarks.record_table import gathered, read_rows, record, table_space
from benchmarks.search_strategies import allowed, curve, main, summary
from hardware.files import UserError
from runtime.config import Workload
from runtime.measurement import Measurement
from tests.made_up import DEVICE, MadeUp, small_space, speed

HARDWARE = "measurements/amd-epyc-2-cores/profile.yaml"


def every_engines_listeners() -> int:
    """How many functions a new connection of any database is handed to, in this process."""
    return len(list(create_engine("sqlite://").pool.dispatch.connect))


def few() -> Space:
    space = small_space()
    fewer = {"denoising_steps": (1,), "levels_count": (1, "dense"), "experts_block": ("loop",)}
    return replace(
        space, parameters=tuple(replace(p, choices=fewer[p.name]) if p.name in fewer else p for p in space.parameters)
    )


def head(**changes: str) -> Head:
    subject = Subject("zaya-nano", "0", DEVICE, Workload(), "prompts", few())
    return Head("", replace(subject, **changes), "record", "abc", "2026-11-21")


class Stopped(MadeUp):
    """A run that is interrupted at a measurement."""

    def __init__(self, at: int) -> None:
        super().__init__(noise=0.1)
        self.at = at

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        if len(self.measured) == self.at:
            raise KeyboardInterrupt
        return super().measure(candidate)


def test_a_table_is_recorded_in_rounds_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rows, settings = tmp_path / "rows.jsonl", few().grid()
    first = Stopped(len(settings) + 5)
    with pytest.raises(KeyboardInterrupt):
        record(first, head(), rows, 2)
    rows.write_text(rows.read_text()[:-20])  # a kill cuts the last line
    second = MadeUp(noise=0.1)
    record(second, head(), rows, 2)
    assert len(second.measured) == len(settings) - 4  # of the second round, with the one that was cut
    orders = [[few().key(c) for c in first.measured[: len(settings)]], [few().key(c) for c in second.measured]]
    assert sorted(orders[0]) == sorted(map(few().key, settings)) and orders[0][-len(orders[1]) :] != orders[1]
    table = gathered(list(read_rows(rows, head())), head())
    assert len(table.settings) == len(settings) and all(len(s.samples) == 2 == len(s.loads) for s in table.settings)
    assert all(s.step_seconds and s.divergence == 0 for s in table.settings) and 0 < table.spread() < 0.3
    write_recording(tmp_path / "table.jsonl", table)
    served = Replay(read_recording(tmp_path / "table.jsonl"))
    for candidate in settings:
        assert served.measure(candidate)[0].tokens_per_second == pytest.approx(speed(candidate), rel=0.4)
    third = MadeUp()
    record(third, head(), rows, 2)
    assert third.measured == []
    with pytest.raises(UserError, match="model weights"):
        record(third, head(model_hash="1"), rows, 2)
    with pytest.raises(UserError, match=r"line 3 is not valid JSON"):
        rows.write_text("\n".join([*rows.read_text().splitlines()[:2], "{", "{}\n"]))
        record(third, head(), rows, 2)


def test_what_fails_is_recorded_once(tmp_path: Path) -> None:
    def fault(candidate: Candidate) -> None:
        if candidate.decoding.sampler == "denoising":
            raise RuntimeError("no")

    class Failing(MadeUp):
        def micro_benchmark(self, candidate: Candidate) -> float:
            self.fault(candidate)
            return super().micro_benchmark(candidate)

    rows = tmp_path / "rows.jsonl"
    record(Failing(fault=fault), head(), rows, 2)
    table = gathered(list(read_rows(rows, head())), head())
    broken = [s for s in table.settings if s.outcome != "correct"]
    assert {(s.outcome, s.reason, s.samples) for s in broken} == {("runtime", "no", ())}
    assert {s.params["sampler"] for s in broken} == {"denoising"}
    lines = [json.loads(line) for line in rows.read_text().splitlines()[1:]]
    assert sum(line["params"]["sampler"] == "denoising" for line in lines) == len(broken)


def test_a_table_has_one_engine_and_quarters_of_mixing() -> None:
    space = table_space(decoding_space(batch=1, cores=2, engine="lean"))
    grid = space.grid()
    assert {c.kernels.engine for c in grid} == {"lean"} and len(grid) > 2000
    assert {c.decoding.mixing_weight for c in grid} == {0.25, 0.5, 0.75, 1.0}


def table() -> Recording:
    space = few()
    settings = tuple(
        Recorded(space.encode(c), (speed(c),), 1000, forwards=1000, acceptance_histogram=(5, 3, 2), divergence=0.0)
        for c in space.grid()
    )
    return Recording(head().subject, "", "", "", settings)


def test_a_search_is_worth_the_best_of_what_may_be_chosen() -> None:
    speeds = {"a": 50.0, "b": 100.0, "c": 97.0}
    assert curve(["x", "a", "c", "b"], speeds, 4) == [0.0, 0.5, 0.97, 1.0]
    assert curve(["a"], speeds, 3) == [0.5, 0.5, 0.5]
    found = summary([[0.5, 0.98, 1.0], [0.4, 0.5, 0.97], [0.1, 0.2, 0.3]], at=2)
    assert found["median"] == [0.4, 0.5, 0.97] and found["median_at_target"] == 0.5
    assert found["evaluations_to_within_3_percent"] == [2, 3, None]
    assert found["median_evaluations_to_within_3_percent"] == 3
    assert found["share_of_seeds_within_3_percent_at_target"] == pytest.approx(1 / 3)
    whole = table()
    lossy = replace(whole.settings[3], params=whole.settings[3].params, divergence=0.02)
    changed = replace(whole, settings=(*whole.settings[:3], replace(lossy, outcome="runtime"), *whole.settings[4:]))
    assert len(allowed(whole, 0.0)) == len(whole.settings) and len(allowed(changed, 0.0)) == len(whole.settings) - 1


def test_the_searches_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them on a small table, through the command: numbers, a figure that is one, and a table to read."""
    monkeypatch.setattr("benchmarks.search_strategies.SAMPLERS", ("seeded", "random"))
    file, figure, out = tmp_path / "table.jsonl", tmp_path / "figure.svg", tmp_path / "found.json"
    write_recording(file, table())
    options = ["--hardware", HARDWARE, "--seeds", "1", "--evaluations", "8"]
    before = every_engines_listeners()
    assert main([str(file), *options, "--figure", str(figure), "--out", str(out)]) == 0
    assert every_engines_listeners() == before  # a pragma for SQLite, left to a process, broke its PostgreSQL
    found = json.loads(out.read_text())
    assert found["recording"]["settings"] == len(table().settings)
    assert set(found["results"]) == set(found["allowed"]) and found["recording"]["subject"]["simulated"]
    for by_name in found["results"].values():
        assert list(by_name) == ["seeded", "random"]
        for numbers in by_name.values():
            assert len(numbers["median"]) == 8 and numbers["median"] == sorted(numbers["median"])
            assert 0 < numbers["median"][0] <= 1
    assert len(ElementTree.fromstring(figure.read_text())) > 20
    assert "| lossless | seeded |" in capsys.readouterr().out
    with pytest.raises(UserError, match="evaluations"):
        main([str(file), "--hardware", HARDWARE, "--evaluations", "100000"])
