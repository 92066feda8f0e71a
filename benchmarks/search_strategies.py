"""Searches compared on a recorded table: how near to its best setting each is after so many evaluations.

python -m benchmarks.search_strategies RECORDING.jsonl --hardware PROFILE.yaml [--out NAME.json] [--figure NAME.svg]

Each strategy of `autotune.strategies` searches the table by the real `tune`, once per seed. An evaluation is a setting
tried, pilots and seeds included. What counts is the best so far of the settings that may be chosen: the lossless ones,
or those that differ from autoregressive decoding in at most 1% of the tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autotune.replay import Recording, Replay, read_recording
from autotune.seeding import Acceptance, Predict, Prediction, Predictor
from autotune.space import Candidate
from autotune.storage import storage_url
from autotune.strategies import SAMPLERS, Sampler
from autotune.study import tune
from benchmarks.common import command, counting, fail_in_one_line
from benchmarks.svg import bands
from hardware.files import plain, write_atomic
from hardware.profile import load_profile
from perfmodel.model_spec import load_spec
from runtime.config import require

LIMITS = {"lossless": 0.0, "at most 1% differs": 0.01}
TARGET_SHARE, TARGET_EVALUATIONS = 0.97, 0.05
_ROUNDS = 6  # of the decision, which this is not about: the fewest that `tune` takes


class Job(NamedTuple):
    """One search."""

    recording: Path
    hardware: str
    engine: str | None
    sampler: Sampler
    seed: int
    max_divergence: float
    trials: int


def search(job: Job) -> list[str]:
    """The settings in the order they were tried, by key."""
    recording, predict = _loaded(job.recording, job.hardware, job.engine)
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        result = tune(
            storage_url(folder),
            recording.subject,
            Replay(recording),
            default=recording.default,
            predict=predict,
            trials=job.trials,
            max_divergence=job.max_divergence,
            rounds=_ROUNDS,
            seed=job.seed,
            sampler=job.sampler,
        )
    space = recording.subject.space
    return [space.key(result.candidate(trial)) for trial in result.measured][: job.trials]


def curve(tried: Sequence[str], speeds: dict[str, float], evaluations: int) -> list[float]:
    """After each evaluation, the best speed so far as a share of the best there is. `speeds`: of what may be chosen.

    A search that ended earlier, because it found nothing new, keeps what it had.
    """
    best, found, top = max(speeds.values()), list[float](), 0.0
    for key in tried[:evaluations]:
        top = max(top, speeds.get(key, 0.0))
        found.append(top / best)
    return found + [found[-1]] * (evaluations - len(found))


def allowed(recording: Recording, max_divergence: float) -> dict[str, float]:
    """Tokens per second of the settings that may be chosen, by key."""
    space, found = recording.subject.space, {}
    for setting in recording.settings:
        candidate = space.candidate(setting.params)
        near = setting.divergence is not None and 0 < max_divergence >= setting.divergence
        if setting.outcome == "correct" and (candidate.decoding.lossless or near):
            found[space.key(candidate)] = setting.tokens_per_second
    return found


def summary(curves: Sequence[Sequence[float]], at: int) -> dict[str, Any]:
    """Quartiles over the seeds after each evaluation; what is reached after `at`; evaluations until within 3%."""
    lower, middle, upper = np.percentile(np.asarray(curves), [25, 50, 75], axis=0).round(4).tolist()
    first = [next((n for n, share in enumerate(c, 1) if share >= TARGET_SHARE), None) for c in curves]
    median = statistics.median(n if n is not None else float("inf") for n in first)
    return {
        "median": middle,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "median_at_target": middle[at - 1],
        "share_of_seeds_within_3_percent_at_target": sum(c[at - 1] >= TARGET_SHARE for c in curves) / len(curves),
        "evaluations_to_within_3_percent": first,
        "median_evaluations_to_within_3_percent": median if median < float("inf") else None,
    }


def noise(recording: Recording, speeds: dict[str, float]) -> dict[str, Any]:
    """How much luck the best of the table can have had."""
    best = max(speeds.values())
    return {
        "settings": len(speeds),
        "best_tokens_per_second": best,
        "settings_within_3_percent": sum(speed >= TARGET_SHARE * best for speed in speeds.values()),
    }


def compare(
    jobs: Sequence[Job], recording: Recording, evaluations: int, processes: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Run the searches; summaries by limit and strategy."""
    done = counting(len(jobs))
    tried: list[list[str]] = []
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn")) if processes > 1 else nullcontext()
    with pool as workers:
        for found in workers.map(search, jobs) if workers else map(search, jobs):
            tried.append(found)
            done(len(tried))
    at = target(recording)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for limit, divergence in LIMITS.items():
        speeds = allowed(recording, divergence)
        for sampler in SAMPLERS:
            curves = [
                curve(order, speeds, evaluations)
                for job, order in zip(jobs, tried, strict=True)
                if job.sampler == sampler and job.max_divergence in (divergence, None if sampler == "seeded" else 0.0)
            ]
            results.setdefault(limit, {})[sampler] = summary(curves, at)
    return results


def target(recording: Recording) -> int:
    """5% of the settings."""
    return int(TARGET_EVALUATIONS * len(recording.settings))


def drawn(results: dict[str, dict[str, dict[str, Any]]], recording: Recording) -> str:
    """The figure."""
    rows = len(recording.settings)
    panels = {
        limit: {n: (s["lower_quartile"], s["median"], s["upper_quartile"]) for n, s in reversed(found.items())}
        for limit, found in results.items()
    }
    return bands(
        panels,
        f"Searches on {rows} recorded settings: {recording.subject.name}",
        "settings tried (dashed: 5% of them)",
        "best so far, share of the best (dashed: within 3%)",
        across=target(recording),
        along=TARGET_SHARE,
    )


def main(arguments: list[str] | None = None) -> int:
    """Search, print, and write what was asked for; returns the exit code."""
    chosen = _arguments(arguments)
    recording = read_recording(chosen.recording)
    evaluations = chosen.evaluations or 2 * target(recording)
    require(
        target(recording) <= evaluations <= len(recording.settings),
        f"{target(recording)} <= evaluations <= {len(recording.settings)} must hold, but got {evaluations}",
    )
    jobs = [
        Job(chosen.recording, chosen.hardware, chosen.engine, sampler, seed, divergence, evaluations)
        for sampler in SAMPLERS
        for divergence in (LIMITS.values() if sampler == "seeded" else (0.0,))  # the others do not ask
        for seed in range(chosen.seeds)
    ]
    results = compare(jobs, recording, evaluations, chosen.processes)
    about = {
        "command": command("benchmarks.search_strategies", arguments),
        "recording": {
            "file": chosen.recording.name,
            "command": recording.command,
            "commit": recording.commit,
            "date": recording.date,
            "settings": len(recording.settings),
            "rounds": max(len(s.samples) for s in recording.settings),
            "spread_between_rounds": round(recording.spread(), 4),
            "subject": {k: v for k, v in plain(recording.subject).items() if k != "space"},
        },
        "seeds": chosen.seeds,
        "target_evaluations": target(recording),
        "allowed": {limit: noise(recording, allowed(recording, share)) for limit, share in LIMITS.items()},
        "results": results,
    }
    if chosen.out:
        write_atomic(chosen.out, json.dumps(about, indent=1) + "\n")
    if chosen.figure:
        write_atomic(chosen.figure, drawn(results, recording))
    print(json.dumps(about, indent=1) if chosen.json else "\n".join(_lines(about, results)))
    return 0


def _lines(about: dict[str, Any], results: dict[str, dict[str, dict[str, Any]]]) -> Iterable[str]:
    found, at = about["recording"], about["target_evaluations"]
    yield (
        f"{found['settings']} settings, medians of {found['rounds']} rounds, which differ by "
        f"{found['spread_between_rounds']:.1%}; after {at} evaluations (5%), {about['seeds']} seeds:"
    )
    yield "| may be chosen | search | median share of the best | seeds within 3% | median evaluations to within 3% |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for limit, by_name in results.items():
        for name, s in by_name.items():
            seeds, needed = s["share_of_seeds_within_3_percent_at_target"], s["median_evaluations_to_within_3_percent"]
            reached = "not reached" if needed is None else f"{needed:g}"
            yield f"| {limit} | {name} | {s['median_at_target']:.3f} | {seeds:.0%} | {reached} |"


@lru_cache(maxsize=1)
def _loaded(path: Path, hardware: str, engine: str | None) -> tuple[Recording, Predict]:
    """Once in a process."""
    recording = read_recording(path)
    about = recording.subject
    predict = Predictor(load_spec(about.model), load_profile(hardware), about.workload, engine)
    known: dict[str, Prediction | None] = {}

    def remembered(candidate: Candidate, acceptance: Acceptance | None) -> Prediction | None:
        name = f"{candidate} {acceptance}"  # the pilots of a recording always accept the same
        if name not in known:
            known[name] = predict(candidate, acceptance)
        return known[name]

    return recording, remembered


def _memory() -> str | None:
    """A folder in memory where there is one: made-up trials would wait for the disk at every commit."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path, help="a recording, as benchmarks.record_table writes it")
    parser.add_argument("--hardware", required=True, help="profile of the device that was recorded, for predictions")
    parser.add_argument("--engine", help="profile of the engine (default: the device's own)")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--evaluations", type=int, help="of each search (default: 10%% of the settings)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--figure", type=Path, help="SVG file for the figure")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
