"""The smaller parts of `benchmarks.gpu`: correctness, probe, bandwidth, engines, prediction."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_session import RECORDS, SHRUNK, Plan, Session, timed_problems
from hardware.fingerprint import cpu_model
from hardware.probe import probe
from hardware.profile import HardwareProfile, list_profiles, load_profile, save_profile
from perfmodel.validation import validate
from runtime.checkpoint import bundled, random_model, save_model
from runtime.kernels.registry import KERNELS, kernel
from runtime.kernels.selection import default_tiling
from runtime.kernels.timing import Timed, time_tilings

REPOSITORY = Path(__file__).parents[1]


def check_kernels(session: Session, plan: Plan) -> None:
    """Every kernel against its reference, in processes of their own: a fault on the device costs one kernel. They run
    at once, because most of the time is compiling; what they compiled is kept for the other parts."""
    folder = session.out / "kernels"
    folder.mkdir()
    seconds = max(1.0, session.deadline - time.monotonic() - 15)  # a case that was begun may take long
    running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    for name in plan.kernels or tuple(KERNELS):
        log = folder / f"{name}.txt"
        program = [sys.executable, "-m", "runtime.kernels.check", "--kernel", name, "--device", session.device]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*program, "--seconds", f"{seconds:.0f}"], cwd=REPOSITORY, stdout=stream, stderr=subprocess.STDOUT
            )
        running[name] = process, log
    warming = warm_up(session, plan)
    for name, (process, log) in running.items():
        alone = ended(process, session.deadline)
        lines = log.read_text(errors="replace").splitlines()
        failed = [line for line in lines if line.startswith("FAIL")]
        passed = sum(line.startswith("ok") for line in lines)
        # One that the clock ended has failed nothing; how many cases it tried is kept.
        right = process.returncode == 0 if alone else passed > 0 and not failed
        facts = {"cases": passed, "ended": (lines or ["no output"])[-1], "failed": failed[:5]}
        session.check(f"kernel {name} equals its reference", right, **facts)
    for process in warming:
        ended(process, session.deadline)


def warm_up(session: Session, plan: Plan) -> list[subprocess.Popen[bytes]]:
    """Compile what the full size will run, a process per batch, with one layer of it: Triton keeps what it compiled."""
    if not session.device.startswith("cuda"):
        return []
    options = ["--part", "full", "--layers", "1", "--device", session.device]
    started = []
    for batch in plan.batches:
        folder = session.out / "warm" / str(batch)
        folder.mkdir(parents=True)
        minutes = str(max(0.0, session.deadline - time.monotonic()) / 60)
        own = ["--batches", str(batch), "--out", str(folder), "--minutes", minutes]
        with (folder / "log.txt").open("wb") as stream:
            program = [sys.executable, "-m", "benchmarks.gpu", *options, *own]
            started.append(subprocess.Popen(program, cwd=REPOSITORY, stdout=stream, stderr=subprocess.STDOUT))
    return started


def probe_device(session: Session, plan: Plan) -> None:
    """The device's own curves, copy bandwidth among them; and the kernels beside a copy."""
    kind = session.device.partition(":")[0]
    threads = None if kind == "cuda" else 1
    profile = session.attempt("probe", lambda: probe(kind, quick=True, threads=threads))
    if profile is not None:
        save_profile(profile, session.out / "hardware.yaml")
    session.release()
    time_kernels(session, plan)


def time_kernels(session: Session, plan: Plan) -> None:
    """Bandwidth of every kernel with its default tiling beside a copy's."""
    if not session.device.startswith("cuda"):
        session.skip("bandwidth", f"kernels are timed on a GPU, not on {session.device}")
        return
    for name, problem in timed_problems(plan):
        tilings = [default_tiling(name, session.device, problem)]
        run = partial(
            time_tilings, kernel(name), problem, plan.dtype, session.device, tilings, deadline=session.deadline
        )
        timed: list[Timed] = session.attempt(f"{name}, {problem}", run) or []
        for one in timed:
            session.write("bandwidth", tokens=problem.tokens, **one.plain())
            if one.seconds:
                speed = f"{one.median_seconds * 1e6:10.2f} us  {one.copy_share:6.1%} of the copy"
                session.say(f"  {speed}  {name}, {problem}")


def compare_engines(session: Session, plan: Plan) -> None:
    """The default engine against the eager one on small models: the same tokens in float32, logits in bfloat16.

    Both models at once: what they compile takes longer than what they run.
    """
    save_model(random_model(SHRUNK, seed=1), session.out / "zaya-shrunk")
    models = ["zaya-nano"] if plan.bundled and "zaya-nano" in bundled() else []
    running: dict[str, tuple[subprocess.Popen[bytes], Path, Path]] = {}
    for model in (*models, str(session.out / "zaya-shrunk")):
        name = Path(model).name
        found, log = session.out / f"engines-{name}.json", session.out / f"engines-{name}.txt"
        options = ["--model", model, "--device", session.device, "--json", "--new-tokens", str(plan.new_tokens[1])]
        program = [sys.executable, "-m", "benchmarks.engine_equality", *options, "--prompts", "5"]
        with found.open("wb") as out, log.open("wb") as err:
            running[name] = subprocess.Popen(program, cwd=REPOSITORY, stdout=out, stderr=err), found, log
    for name, (process, found, log) in running.items():
        if ended(process, session.deadline):
            facts = counted(found.read_text(), log.read_text(errors="replace"))
            session.check(f"{name}: the engine equals eager", process.returncode == 0, **facts)
        else:
            session.skip(f"engines, {name}", "out of time")


def ended(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether it ended by itself until then, on time.monotonic's clock; if not, it is killed."""
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def counted(document: str, errors: str) -> dict[str, Any]:
    """What `engine_equality` found, in a few figures: prompts with another token, and argmaxes that differ."""
    if not document.strip():
        return {"ended": errors.splitlines()[-1:]}
    found = json.loads(document)
    return {
        "prompts_that_differ": {
            dtype: sum(len(t["first"]) for t in found["tokens"] if t["dtype"] == dtype)
            for dtype in ("float32", "bfloat16")
        },
        "argmaxes_that_differ": [
            {name: x[name] for name in ("dtype", "slots", "differing_argmaxes", "positions", "error")}
            for x in found["logits"]
        ],
    }


def predict(session: Session, plan: Plan) -> None:
    """Predicted beside measured, of every point: by the device's data file where there is one, and by its probe."""
    measured = [m for name in RECORDS for m in session.records(name)]
    if not measured:
        return session.skip("prediction", "nothing was measured")
    profiles = [load_profile(name) for name in shipped(str(measured[0].device["device"]))]
    if (session.out / "hardware.yaml").is_file():
        profiles.append(load_profile(session.out / "hardware.yaml"))
    for profile, engine in itertools.product(profiles, sorted({m.kernels.engine for m in measured})):
        rows = [m for m in measured if m.kernels.engine == engine]
        found = session.attempt(f"prediction of {engine} on {profile.name}", partial(validate, rows, profile))
        for row in found or ():
            session.write("predicted", hardware=profile.name, error=row.error, **asdict(row))


def device_profile(session: Session) -> HardwareProfile | None:
    """What predictions are made for: the device's data file, else what the probe of this run found, if it ran."""
    on_gpu = session.device.startswith("cuda")
    name = str(torch.cuda.get_device_name(session.device)) if on_gpu else cpu_model()
    files = [*shipped(name), *map(str, session.out.glob("hardware.yaml"))]
    return load_profile(files[0]) if files else None


def shipped(device: str) -> list[str]:
    """Data files of this device, by its name: all words of theirs are in it."""
    words = set(slug(device).split("-"))
    return [name for name in list_profiles() if set(name.split("-")) <= words]


def slug(name: str) -> str:
    """A device's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
