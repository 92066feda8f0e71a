"""Everything to learn on a machine with a GPU, in one go: correctness, full-size speed, tuning, engines, predictions.

python -m benchmarks.gpu --out DIR [--device cuda] [--small]      (or benchmarks/gpu.sh, which picks the device)

It needs torch, numpy, pyyaml and safetensors, and for the kernels triton; `transformers` is timed beside where it is
installed. Every part runs in a process of its own with a share of the time: a fault or a hang costs one part. Each
record is written as soon as it exists; a point that does not fit in memory, or that cannot run, is skipped and its
reason kept. Full-size weights are random: routing and acceptance are then not real, and the records say so.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command, fail_in_one_line
from benchmarks.gpu_parts import REPOSITORY, check_kernels, compare_engines, predict, probe_device, slug
from benchmarks.gpu_session import FULL, RECORDS, SMALL, Plan, Session
from benchmarks.gpu_speed import full_size
from benchmarks.gpu_tuning import decoding_table, pairs_table, tilings_table, tune
from hardware.files import UserError, known, write_atomic
from perfmodel.steps import title
from perfmodel.validation import measured_seconds, point_name
from runtime.config import replace
from runtime.measurement import Measurement

GRACE_SECONDS = 12.0  # beyond a part's share: to start it, and for the point that was begun
# In this order; a part may take its share of the whole time, and what the ones before it left.
PARTS: dict[str, tuple[float, Callable[[Session, Plan], None]]] = {
    "kernels": (0.18, check_kernels),
    "probe": (0.08, probe_device),
    "full": (0.28, full_size),
    "tuning": (0.36, tune),
    "engines": (0.08, compare_engines),
    "predict": (0.02, predict),
}


KEPT = (  # of the results, in the folder of the device
    *(f"{name}.jsonl" for name in RECORDS), "correctness.jsonl", "hardware.yaml", "beside.jsonl", "bandwidth.jsonl",
    "tilings.jsonl", "tilings.json", "decoding.jsonl", "pairs.jsonl", "predicted.jsonl", "skipped.jsonl", "results.md",
    "engines-zaya-nano.json", "engines-zaya-shrunk.json",
)  # fmt: skip


def run_parts(session: Session, options: list[str], seconds: float) -> None:
    """All parts, one after the other."""
    end = time.monotonic() + seconds
    for index, (name, (share, _)) in enumerate(PARTS.items()):
        later = sum(share for share, _ in list(PARTS.values())[index + 1 :])
        left = max(share * seconds / 2, end - time.monotonic() - later * seconds)
        session.say(f"{name}: up to {left:.0f} s")
        program = [sys.executable, "-m", "benchmarks.gpu", *options, "--part", name, "--minutes", str(left / 60)]
        # A session of its own: what a part has started ends with it.
        process = subprocess.Popen(program, cwd=REPOSITORY, start_new_session=True)
        try:
            code = process.wait(left + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            session.skip(f"the rest of {name}", "out of time: the part was ended")
            continue
        finally:  # an interrupt too
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            session.skip(f"the rest of {name}", f"the part ended with code {code}")


def table(records: list[Measurement], predicted: dict[tuple[str, str], float]) -> Iterator[str]:
    """Every point, as Markdown. predicted: seconds by hardware and point."""
    profiles = sorted({hardware for hardware, _ in predicted})
    yield (
        "".join(f"| {t} " for t in ("engine", "what", "batch", "slots", "context", "measured", "tokens/s"))
        + "".join(f"| predicted, {name} | error " for name in profiles)
        + "|"
    )
    yield "| --- | --- " + "| ---: " * (5 + 2 * len(profiles)) + "|"
    for m in records:
        what = f"{title(m.decoding)} step" if m.kind == "generation" else str(m.forward)
        what += f": {m.operator}" if m.operator else ""
        rate = f"{m.tokens_per_second:.1f}" if m.kind == "generation" else "-"
        seconds = measured_seconds(m)
        cells = [m.kernels.engine, what, m.workload.batch, m.slots, m.context, f"{seconds * 1e3:.3f} ms", rate]
        for name in profiles:
            guess = predicted.get((name, point_name(m)))
            cells += ["-", "-"] if guess is None else [f"{guess * 1e3:.3f} ms", f"{guess / seconds - 1:+.0%}"]
        yield "| " + " | ".join(map(str, cells)) + " |"


def bandwidth_table(timed: list[dict[str, Any]]) -> Iterator[str]:
    """Every kernel and problem with the default tiling, as Markdown."""
    yield "| kernel | problem | time | GB/s | of the copy's |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for one in timed:
        if one["seconds"]:
            yield (
                f"| {one['kernel']} | {one['problem']} | {one['median_seconds'] * 1e6:.2f} us "
                f"| {one['bytes_per_second'] / 1e9:.0f} | {one['copy_share']:.0%} |"
            )


def finish(session: Session, measurements: Path | None) -> int:
    """Print and write what was found; the exit code is 1 when a correctness check failed or none ran."""
    records = [m for name in RECORDS for m in session.records(name)]
    predicted = {(p["hardware"], p["name"]): p["predicted_seconds"] for p in session.lines("predicted")}
    lines = list(table(records, predicted))
    lines += ["", *bandwidth_table(session.lines("bandwidth"))]
    lines += ["", *tilings_table(session), "", *decoding_table(session), "", *pairs_table(session)]
    write_atomic(session.out / "results.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    checks = session.lines("correctness")
    failed = [check["check"] for check in checks if not check["passed"]]
    print(f"\n{len(checks)} checks, {len(failed)} failed {failed or ''}")
    print(f"{len(records)} records, {len(session.lines('skipped'))} points skipped; results: {session.out}")
    if measurements is not None and records:
        target = measurements / slug(str(records[0].device["device"]))
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            (target / name).unlink(missing_ok=True)  # or a file of an earlier run would stand beside this one's
            if (session.out / name).is_file():
                write_atomic(target / name, (session.out / name).read_bytes())
        logs = sorted((session.out / "kernels").glob("*.txt"))
        write_atomic(target / "kernels.txt", "\n".join(log.read_text(errors="replace") for log in logs))
        print(f"copied to {target}")
    return 1 if failed or not checks else 0


def numbers(text: str) -> tuple[int, ...]:
    """`1,8`; argparse makes a line of a ValueError."""
    return tuple(map(int, text.split(",")))


def main(arguments: list[str] | None = None) -> int:
    """Run everything, or one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for all results; must be empty or absent")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="a shrunk model on few points, to test this program")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no new point after so long")
    parser.add_argument("--measurements", type=Path, help="copy the records to a folder per device in here")
    parser.add_argument("--batches", type=numbers, help="of full-size steps, with commas between")
    parser.add_argument("--layers", type=int, help="fewer layers of the full size, to compile what it will run")
    parser.add_argument("--part", help=f"run only this one into --out: {', '.join(PARTS)}")
    chosen = parser.parse_args(arguments)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"no device {chosen.device}: torch sees no GPU; --small --device cpu tests this program")
    if chosen.part is not None and chosen.part not in PARTS:
        raise known("part", chosen.part, PARTS)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    out = chosen.out.resolve()
    if chosen.part is None and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds results already; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    plan = SMALL if chosen.small else FULL
    if chosen.layers is not None:
        plan = replace(plan, model=replace(plan.model, num_hidden_layers=chosen.layers, layer_types=()))
    if chosen.batches is not None:
        plan = replace(plan, batches=chosen.batches)
    deadline = time.monotonic() + 60 * chosen.minutes
    session = Session(chosen.device, out, deadline, command("benchmarks.gpu", arguments))
    if chosen.part is not None:
        PARTS[chosen.part][1](session, plan)
        return 0
    options = ["--out", str(out), "--device", chosen.device, *(["--small"] if chosen.small else [])]
    for name in ("threads", "layers"):
        if getattr(chosen, name) is not None:
            options += [f"--{name}", str(getattr(chosen, name))]
    if chosen.batches is not None:
        options += ["--batches", ",".join(map(str, chosen.batches))]
    run_parts(session, options, 60 * chosen.minutes)
    return finish(session, chosen.measurements)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
