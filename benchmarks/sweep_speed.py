"""How fast predictions are: operating points per second of a sweep, and the wall time of one `ridgepoint predict`.

python -m benchmarks.sweep_speed [--model zaya1-8b] [--hardware h100-sxm,mi300x] [--out FILE.json] [--json]

A point is one combination of batch, context and K: the sampler's step, its bound, the autoregressive step beside it,
tokens per second, speedup, memory and cost. NumPy works on one thread here. `predict` starts a fresh Python.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import command, counting, fail_in_one_line
from hardware.files import write_atomic
from hardware.fingerprint import fingerprint, git_commit
from hardware.profile import load_profile
from perfmodel.decoding import Setting, setting
from perfmodel.model_spec import load_spec
from perfmodel.sweep import sweep
from runtime.config import DecodingConfig, require

GRIDS: dict[str, tuple[Sequence[int], Sequence[int]]] = {  # batches and contexts
    "100 batches, 100 contexts": (range(1, 101), range(500, 50_001, 500)),
    "1000 batches, one context": (range(1, 1001), (4096,)),  # the hardest: what does not depend on it is shared by few
}
DRAFT_TOKENS = tuple(range(1, 17))
SAMPLERS = {
    "autoregressive": DecodingConfig(),
    "two_forward": DecodingConfig("two_forward"),
    "single_forward": DecodingConfig("single_forward"),
}
PREDICT = "predict --batch 16 --context 2048 --sampler two_forward --draft-tokens 16 --acceptance-length 6.8 --json"


def seconds_of(run: Callable[[], object], repeats: int) -> list[float]:
    """Wall seconds of each of `repeats` runs, after one that warms up."""
    found = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        run()
        if repeat > 0:
            found.append(time.perf_counter() - start)
    return found


def sweep_speed(
    at: Setting, decoding: DecodingConfig, batch: Sequence[int], context: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Points per second of one sweep: the median over repeats, and each repeat's seconds."""
    drafts: Sequence[int] = DRAFT_TOKENS if decoding.drafts else (16,)

    def run() -> None:
        sweep(at, decoding, batch=batch, context=context, draft_tokens=drafts, acceptance_length=1.0)

    points = len(batch) * len(context) * len(drafts)
    seconds = seconds_of(run, repeats)
    return {"points": points, "points_per_second": points / statistics.median(seconds), "seconds": seconds}


def predict_seconds(model: str, hardware: str, repeats: int) -> list[float]:
    """Wall seconds of `ridgepoint predict` from the shell."""
    words = [sys.executable, "-m", "ridgepoint", *PREDICT.split(), "--model", model, "--hardware", hardware]
    folder = Path(__file__).parents[1]
    return seconds_of(lambda: subprocess.run(words, cwd=folder, check=True, capture_output=True), repeats)


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    chosen = _arguments(arguments)
    require(chosen.repeats >= 1, f"repeats >= 1 must hold, but got {chosen.repeats}")
    devices = chosen.hardware.split(",")
    progress = counting(len(devices) * len(SAMPLERS) * len(GRIDS) + 1)
    load = os.getloadavg()[0]
    sweeps = []
    for name in devices:
        hardware = load_profile(name)
        dtype = "bfloat16" if hardware.kind == "gpu" else "float32"
        at = setting(load_spec(chosen.model), hardware, dtype, engine=chosen.engine)
        for (sampler, decoding), (grid, axes) in itertools.product(SAMPLERS.items(), GRIDS.items()):
            found = sweep_speed(at, decoding, *axes, chosen.repeats)
            sweeps.append({"hardware": name, "engine": at.engine.name, "sampler": sampler, "grid": grid, **found})
            progress(len(sweeps))
    wall = predict_seconds(chosen.model, devices[0], chosen.repeats)
    progress(len(sweeps) + 1)
    document = {
        "model": chosen.model,
        "command": command("benchmarks.sweep_speed", arguments),
        "commit": git_commit(Path(__file__)),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "device": fingerprint(),
        "load_average": load,  # of the last minute: other work slows these figures down
        "draft_tokens": len(DRAFT_TOKENS),
        "sweeps": sweeps,
        "predict": {"seconds_median": statistics.median(wall), "seconds": wall},
    }
    text = json.dumps(document, indent=1) + "\n"
    if chosen.out is not None:
        write_atomic(chosen.out, text)
    print(text if chosen.json else _table(document), end="")
    return 0


def _table(document: dict[str, Any]) -> str:
    lines = ["| device | engine | sampler | grid | points/s |", "| --- | --- | --- | --- | ---: |"]
    for s in document["sweeps"]:
        lines.append(
            f"| {s['hardware']} | {s['engine']} | {s['sampler']} | {s['grid']} | {s['points_per_second']:,.0f} |"
        )
    lines.append(f"\none `ridgepoint predict` from the shell: {document['predict']['seconds_median']:.2f} s")
    lines.append(f"load average before: {document['load_average']:.1f}")
    return "\n".join(lines) + "\n"


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zaya1-8b", help="a known model or a config.json")
    parser.add_argument("--hardware", default="h100-sxm,mi300x", help="known devices or YAML files, with commas")
    parser.add_argument("--engine", help="a known engine or its YAML file (default: ours)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the whole result")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
