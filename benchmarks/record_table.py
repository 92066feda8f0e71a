"""Record a table of settings: each in several rounds, for searches to be compared on (`autotune.replay`).

python -m benchmarks.record_table --rows ROWS.jsonl --out RECORDING.jsonl [--batch 1] [--rounds 5]

A round goes through all settings in an order of its own, so that what else the machine does meets other settings in
each. Every measurement is one line of ROWS at once: the same command continues where it was stopped, and more rounds
are added by a larger number. One engine, the model's own; mixing weights in quarters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autotune.local import Plan, Work, searched
from autotune.objective import Runner, StageFailure
from autotune.replay import Head, Recorded, Recording, write_recording
from autotune.space import Candidate, Parameter, Space
from benchmarks.common import command, counting, fail_in_one_line
from hardware.files import UserError, build, plain
from runtime.config import ENGINES, require

_WEIGHT_STEP = 0.25
_ROW = "ridgepoint-recording-rows-1"


def table_space(space: Space) -> Space:
    """The part of a space that is recorded."""

    def fewer(parameter: Parameter) -> Parameter:
        engines = tuple(value for value in parameter.choices if value in ENGINES)
        if parameter.name in ("experts_single", "experts_block") and engines:
            return dataclasses.replace(parameter, choices=engines[:1])
        if parameter.name == "mixing_weight":
            return dataclasses.replace(parameter, step=_WEIGHT_STEP)
        return parameter

    return dataclasses.replace(space, parameters=tuple(map(fewer, space.parameters)))


def record(
    runner: Runner, head: Head, rows: Path, rounds: int, progress: Callable[[int], None] = lambda n: None
) -> None:
    """Measure what `rows` lacks of so many rounds. UserError for rows of something else, or a damaged line."""
    space = head.subject.space
    settings = {space.key(candidate): candidate for candidate in space.grid()}
    known = list(read_rows(rows, head)) if rows.exists() else []
    done = {(row["round"], _key(row)) for row in known}
    failed = {_key(row) for row in known if row["outcome"] != "correct"}
    with rows.open("a", encoding="utf-8") as stream:
        if not stream.tell():
            _append(stream, {**plain(head), "format": _ROW})
        for number in range(rounds):
            order = list(settings)
            random.Random(number).shuffle(order)
            for i, key in enumerate(order):
                if (number, key) not in done and key not in failed:
                    row = measured(runner, settings[key], first=number == 0)
                    if row["outcome"] != "correct":
                        failed.add(key)
                    _append(stream, {"round": number, "params": space.encode(settings[key]), **row})
                progress(number * len(order) + i + 1)


def measured(runner: Runner, candidate: Candidate, *, first: bool) -> dict[str, Any]:
    """One sample of a setting; at the first also the time of a step and the quality, which do not change."""
    try:
        reason = runner.infeasible(candidate)
        if reason is not None:
            return {"outcome": "infeasible", "reason": reason}
        step_seconds = runner.micro_benchmark(candidate)  # warms up, too
        record, outputs = runner.measure(candidate)
        found: dict[str, Any] = {"seconds": sum(record.seconds), "tokens": sum(record.tokens), "load": _load()}
        if first:
            found |= {
                "step_seconds": step_seconds,
                "forwards": record.forwards // len(record.seconds),
                "acceptance_histogram": list(record.acceptance_histogram),
                "experts_per_layer": record.experts_per_layer,
                **runner.quality(outputs),
            }
        return {"outcome": "correct", **found}
    except StageFailure as failure:
        return {"outcome": failure.outcome, "reason": failure.reason}
    except (UserError, RuntimeError) as error:
        return {"outcome": "infeasible" if isinstance(error, UserError) else "runtime", "reason": str(error)}


def read_rows(path: Path, head: Head) -> Iterator[dict[str, Any]]:
    """The rows measured so far. A last line that a kill cut is dropped from the file: its setting is measured again."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not valid JSON: {error.msg}") from error
        if number > 1:
            yield row
            continue
        require(row.get("format") == _ROW, f"{path} line 1: format must be {_ROW!r}, but is {row.get('format')!r}")
        different = build(Head, row, f"{path} line 1").subject.mismatch(head.subject)
        require(different is None, f"{path} was recorded with {different}: record into another file")


def gathered(rows: Sequence[dict[str, Any]], head: Head) -> Recording:
    """Rows as a recording: a line per setting, its samples in the order of the rounds."""
    settings: dict[str, dict[str, Any]] = {}
    names = {f.name for f in dataclasses.fields(Recorded)}
    for row in sorted(rows, key=lambda row: row["round"]):
        found = settings.setdefault(_key(row), {"samples": [], "loads": [], "outcome": "correct"})
        found |= {name: value for name, value in row.items() if name in names}
        if row["outcome"] == "correct":
            found["samples"].append(round(row["tokens"] / row["seconds"], 1))
            found["loads"].append(row["load"])
    recorded = tuple(build(Recorded, found, f"the rows of {key}") for key, found in settings.items())
    return Recording(head.subject, head.command, head.commit, head.date, recorded)


def _key(row: dict[str, Any]) -> str:
    return json.dumps(row["params"], sort_keys=True)


def _append(stream: Any, row: dict[str, Any]) -> None:
    stream.write(json.dumps(row) + "\n")
    stream.flush()


def _load() -> float:
    return float(Path("/proc/loadavg").read_text().split()[0])


def main(arguments: list[str] | None = None) -> int:
    """Measure, then write the recording; returns the exit code."""
    chosen = _arguments(arguments)
    work = Work(
        chosen.model,
        batch=chosen.batch,
        prompts=chosen.prompts,
        new_tokens=chosen.new_tokens,
        repeats=1,
        command=command("benchmarks.record_table", arguments),
    )
    runner = work()
    described = runner.describe()
    subject, _ = searched(work, described, Plan())
    subject = dataclasses.replace(subject, space=table_space(subject.space))
    head = Head(_ROW, subject, work.command, described.identity.commit, f"{datetime.now(UTC):%Y-%m-%d}")
    chosen.rows.parent.mkdir(parents=True, exist_ok=True)
    record(runner, head, chosen.rows, chosen.rounds, counting(chosen.rounds * len(subject.space.grid())))
    recording = gathered(list(read_rows(chosen.rows, head)), head)
    write_recording(chosen.out, recording)
    loads = sorted(load for setting in recording.settings for load in setting.loads)
    print(
        f"{len(recording.settings)} settings in {chosen.rounds} rounds: two rounds of a setting differ by "
        f"{recording.spread():.1%} (median); load {loads[len(loads) // 2]:.2f} (median), {loads[-1]:.2f} at most"
    )
    return 0


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zaya-nano", help="a bundled checkpoint or a folder")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=10, help="held-out problems, rounded up to whole batches")
    parser.add_argument("--new-tokens", type=int, default=96, help="at most, per prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=Path, required=True, help="file of raw measurements, which is continued")
    parser.add_argument("--out", type=Path, required=True, help="recording to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
