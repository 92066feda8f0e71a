"""Recorded measurements as a device: what is read, refused, served and searched."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.objective import StageFailure
from autotune.replay import Recorded, Recording, Replay, read_recording, write_recording
from autotune.results import Subject
from autotune.space import Candidate, Space, Value, decoding_space
from autotune.storage import storage_url
from autotune.study import tune
from hardware.files import UserError
from runtime.config import DecodingConfig, Workload
from tests.made_up import DEVICE, acceptance_length, oracle, speed, unsynced

ROUNDS = (0.98, 1.0, 1.05)


def space() -> Space:
    """Two settings of four parameters, but for K."""
    few: dict[str, tuple[Value, ...]] = {
        "denoising_steps": (1,),
        "experts_single": ("gather",),
        "experts_block": ("loop",),
        "levels_count": (1, "dense"),
    }
    full = decoding_space(batch=1, cores=2, lossless=True)
    parameters = (replace(p, choices=few[p.name]) if p.name in few else p for p in full.parameters)
    return Space(1, tuple(replace(p, high=2) if p.name == "draft_tokens" else p for p in parameters))


def recorded(candidate: Candidate) -> Recorded:
    decoding, tokens = candidate.decoding, 1000
    steps = round(tokens / acceptance_length(decoding))
    return Recorded(
        params=space().encode(candidate),
        samples=tuple(speed(candidate) * factor for factor in ROUNDS),
        tokens=tokens,
        forwards=steps * decoding.forwards_per_step,
        acceptance_histogram=(0, steps) if decoding.drafts else (),
        divergence=0.0,
        exact_match=0.5,
        loads=(0.5, 0.6, 1.7),
    )


def recording() -> Recording:
    about = Subject("made-up", "0", DEVICE, Workload(), "prompts", space())
    return Recording(about, "record", "abc", "2026-11-21", tuple(recorded(c) for c in space().grid()))


def test_a_recording_is_read_as_it_was_written_and_says_that_it_is_replayed(tmp_path: Path) -> None:
    written, file = recording(), tmp_path / "table.jsonl"
    write_recording(file, written)
    found = read_recording(file)
    assert found.settings == written.settings and found.command == "record"
    assert found.subject.simulated == "replayed from table.jsonl"
    assert replace(found.subject, simulated=None) == written.subject
    random = replace(written, subject=replace(written.subject, simulated="random weights"))
    write_recording(file, random)
    assert read_recording(file).subject.simulated == "random weights; replayed from table.jsonl"
    assert found.default.kernels.threads == 2 and found.default.decoding == DecodingConfig()
    write_recording(file, replace(written, settings=tuple(replace(s, samples=s.samples[:1]) for s in written.settings)))
    assert "of one round: intervals of ratios mean nothing" in str(read_recording(file).subject.simulated)
    assert found.spread() == pytest.approx(0.035, abs=0.01)  # between rounds of 0.98, 1 and 1.05


def lines_of(file: Path) -> list[str]:
    write_recording(file, recording())
    return file.read_text().splitlines()


@pytest.mark.parametrize(
    ("line", "change", "words"),
    [
        (1, {"format": "ridgepoint-recording-0"}, ["format", "ridgepoint-recording-1"]),
        (1, {"colour": "red"}, ["colour"]),
        (3, {"speed": 3.0}, ["speed"]),
        (3, {"samples": [1.0, 0.0]}, ["samples"]),
        (3, {"samples": []}, ["samples"]),
        (3, {"divergence": None}, ["divergence"]),
        (3, {"outcome": "lost"}, ["lost", "correct"]),
        (3, {"params": {"sampler": "dreaming"}}, ["dreaming"]),
        (3, {"params": {"sampler": "autoregressive"}}, ["experts_single"]),
    ],
)
def test_what_is_no_recording_is_refused_by_line(
    line: int, change: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "table.jsonl"
    lines = lines_of(file)
    lines[line - 1] = json.dumps(json.loads(lines[line - 1]) | change)
    file.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        read_recording(file)
    assert f"line {line}" in str(error.value) and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "table.jsonl"
    lines = lines_of(file)
    for text, words in [
        ("\n".join(lines)[:-9], f"line {len(lines)} .*cut off"),
        ("", "empty"),
        ("\n".join([*lines, lines[5]]), f"line {len(lines) + 1}.* once"),
        ("[]", "line 1 must hold a mapping"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            read_recording(file)
    with pytest.raises(UserError, match="cannot read"):
        read_recording(tmp_path / "none.jsonl")


def test_it_serves_what_was_recorded() -> None:
    """The median of the rounds, what was counted, and the step that the pass was made of."""
    table = recording()
    runner = Replay(table)
    for candidate in table.subject.space.grid():
        assert runner.infeasible(candidate) is None and runner.numerics(candidate) == {}
        measurement, outputs = runner.measure(candidate)
        assert measurement.tokens_per_second == pytest.approx(speed(candidate))
        assert runner.quality(outputs) == {"divergence": 0.0, "exact_match": 0.5}
        steps = 1000 / acceptance_length(candidate.decoding)
        assert runner.micro_benchmark(candidate) * steps == pytest.approx(1000 / speed(candidate), rel=0.01)
    timed = replace(table, settings=tuple(replace(s, step_seconds=0.125, logit_error=1e-6) for s in table.settings))
    first = Replay(timed)
    assert first.micro_benchmark(table.default) == 0.125 and first.numerics(table.default) == {"logit_error": 1e-6}


def test_what_was_not_recorded_is_infeasible_by_name() -> None:
    table = recording()
    few = replace(table, settings=table.settings[:5])
    runner, missing = Replay(few), table.subject.space.candidate(table.settings[7].params)
    assert "does not have" in str(runner.infeasible(missing))
    with pytest.raises(StageFailure, match="does not have"):
        runner.measure(missing)
    assert "another space" in str(runner.infeasible(Candidate(DecodingConfig(temperature=1.0), missing.kernels)))


def test_pairs_are_of_all_rounds_with_all_rounds() -> None:
    table = recording()
    runner, other = Replay(table), table.subject.space.candidate(table.settings[7].params)
    default = recorded(table.default).samples
    found = [runner.pair(table.default, other) for _ in range(9)]
    assert sorted(found) == sorted(itertools.product(default, table.settings[7].samples))
    assert runner.pair(table.default, other) == found[0]


def test_a_pace_waits_as_long_as_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    table, waited = recording(), list[float]()
    monkeypatch.setattr("time.sleep", waited.append)
    Replay(table).measure(table.default)
    assert waited == []
    runner = Replay(table, pace=0.5)
    runner.measure(table.default)
    runner.pair(table.default, table.default)
    seconds = 1000 / speed(table.default)
    assert waited == pytest.approx([0.5 * seconds, 0.5 * 2 * seconds / ROUNDS[0]])
    with pytest.raises(UserError, match="pace"):
        Replay(table, pace=-1)


def test_a_recorded_table_is_searched_like_a_machine(tmp_path: Path) -> None:
    """What failed when it was recorded fails again; the rest has the speed that it had."""
    table = recording()
    broken = {4: "runtime", 9: "compile", 11: "infeasible", 13: "timeout"}
    settings = [
        Recorded(s.params, outcome=broken[i], reason="as it was") if i in broken else s  # type: ignore[arg-type]
        for i, s in enumerate(table.settings)
    ]
    table = replace(table, settings=tuple(settings))
    options: dict[str, Any] = {"default": table.default, "predict": oracle, "trials": len(settings), "sampler": "grid"}
    with unsynced():
        result = tune(storage_url(tmp_path), table.subject, Replay(table), **options)
    assert len(result.measured) == len(settings)
    grid = result.subject.space
    for trial in result.measured:
        index = next(i for i, s in enumerate(settings) if s.params == grid.encode(result.candidate(trial)))
        if index in broken:
            assert (trial.outcome, trial.reason) == (broken[index], "as it was")
        elif trial.outcome == "correct":
            assert trial.tokens_per_second == pytest.approx(settings[index].tokens_per_second)
        else:
            assert trial.outcome == "slower"
    best = max(s.tokens_per_second for s in settings if s.samples)
    assert result.decision and result.trial(result.decision.challenger).tokens_per_second == pytest.approx(best)
    assert result.subject.simulated is None  # as the recording's own subject was not read from a file
