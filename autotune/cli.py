"""`ridgepoint tune`, `study show`, `study report` and `export`."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autotune.effort import EFFORTS, Budget, duration_seconds, effort
from autotune.tuning import STEP_KERNELS, Found, Request, run
from hardware.files import UserError, known

if TYPE_CHECKING:
    from autotune.results import StudyResult
    from autotune.tiling_results import TilingResult

INTERRUPTED = 130  # exit code
STORAGE_VARIABLE = "RIDGEPOINT_STORAGE"
COMMAND_VARIABLE = "RIDGEPOINT_COMMAND"
study_app = typer.Typer(help="What tuning has measured so far.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
_SOURCE = "The folder, the SQLite file or the database URL of a tuning run, or a tilings.json of benchmarks/gpu.sh."
Source = Annotated[str, typer.Argument(help=_SOURCE)]
_PRESETS = "; ".join(f"{name}: {e.trials} settings or {e.seconds:g} s a bucket" for name, e in EFFORTS.items())


def register(app: typer.Typer) -> None:
    """Add this package's commands to the root command."""
    app.command()(tune)
    app.add_typer(study_app, name="study")
    app.command()(export)


def tune(
    model: Annotated[
        str | None, typer.Option(help="A model that ships, or a checkpoint's folder (default: zaya-nano).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default), cuda or cuda:N (ROCm too).")] = None,
    batch: Annotated[
        str | None, typer.Option(help="Sequences decoded at once: numbers with commas, a study each (default: 1).")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Cached tokens that prompts fill up to: numbers with commas, a study each (default: short)."),
    ] = None,
    what: Annotated[
        str | None, typer.Option(help="decoding, tilings or both (default: both on a GPU, decoding on a CPU).")
    ] = None,
    effort_name: Annotated[str, typer.Option("--effort", help=f"How much to measure. {_PRESETS}.")] = "standard",
    budget: Annotated[
        str | None, typer.Option(help="Most time for all of it, as 90s, 15m or 2h; shared over the buckets.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Settings to measure per bucket, earlier runs included.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Most time per bucket, the decision included.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Held-out problems to decode, rounded up to batches.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate for each problem.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Recorded passes over the problems in a trial.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Alternating rounds of the best setting against the default.")
    ] = None,
    trial_seconds: Annotated[
        float | None, typer.Option(help="Time limit of one step of a trial; over it, the outcome is timeout.")
    ] = None,
    tilings: Annotated[
        int | None, typer.Option(help="Tilings of a kernel to measure per bucket, the best by the model.")
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Search only settings that verify with weight 1.")
    ] = False,
    max_divergence: Annotated[
        float, typer.Option(help="Share of tokens in which the chosen setting may differ from autoregression.")
    ] = 0.0,
    histogram: Annotated[
        str | None,
        typer.Option("--acceptance-histogram", help="Steps that accepted 0, 1, 2... drafts: chooses proposal levels."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the study and the probed profile.")] = Path("runs/tune"),
    storage: Annotated[
        str | None,
        typer.Option(
            envvar=STORAGE_VARIABLE, help="Database URL of the study (default: study.db in the folder, SQLite)."
        ),
    ] = None,
    workers: Annotated[
        str, typer.Option(help="Processes that tune at once; auto: one per visible GPU. More than one need PostgreSQL.")
    ] = "1",
    replay: Annotated[
        Path | None, typer.Option(help="A recording to search instead of a device (docs/tuning.md).")
    ] = None,
    replay_pace: Annotated[
        float, typer.Option(help="Recorded seconds are waited for this many times over; 0: not at all.")
    ] = 0.0,
    kernels: Annotated[
        str | None, typer.Option(help=f"Kernels to tile, with commas (default: {','.join(STEP_KERNELS)}).")
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            help="Routes to time the experts' tilings with: recorded:MODEL (default: the model itself), measured:FILE "
            "or uniform."
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Random weights for the model's config, where no checkpoint is at hand: step times are real, routing "
            "and acceptance are not, and every record says so.",
        ),
    ] = False,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="This device's profile, for predictions (default: a GPU's that ships; of a CPU a quick probe, kept)."
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Profile of the engine that is predicted, as ridgepoint-lean or the YAML file of a calibration; "
            "which engine runs is searched, or chosen by --engine of bench and generate."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the space, the buckets and the predictions; measure nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Search the fastest settings on this device. The same command again continues where it stopped."""
    from autotune.console import note, print_study, print_tilings, progress
    from autotune.dry_run import dry_run as look_ahead
    from autotune.dry_run import lines
    from autotune.storage import shown, storage_url
    from autotune.workers import plan_workers, terminated_as_interrupted

    if replay is not None:
        given: dict[str, object] = {"model": model, "device": device, "batch": batch, "context": context, "what": what}
        given |= {"prompts": prompts, "new-tokens": new_tokens, "repeats": repeats}
        given |= {"lossless": lossless or None, "acceptance-histogram": histogram, "routing": routing}
        given |= {"kernels": kernels, "tilings": tilings, "random-weights": random_weights or None}
        _refuse([name for name, value in given.items() if value is not None])
    asked = Request(
        effort=effort(effort_name).with_options(
            trials=trials,
            seconds=seconds,
            prompts=prompts,
            new_tokens=new_tokens,
            repeats=repeats,
            rounds=rounds,
            trial_seconds=trial_seconds,
            tilings=tilings,
        ),
        model=model or "zaya-nano",
        device=device or "cpu",
        batches=_numbers("batch", batch or "1"),
        contexts=_numbers("context", context) if context else (),
        what=what,  # type: ignore[arg-type]  # it is checked there
        lossless=lossless,
        max_divergence=max_divergence,
        histogram=_counts(histogram) if histogram else (),
        hardware=hardware,
        engine=engine,
        seed=seed,
        random_weights=random_weights,
        routing=routing,
        kernels=tuple(kernels.split(",")) if kernels else STEP_KERNELS,
        replay=replay,
        replay_pace=replay_pace,
    )
    limit = Budget(duration_seconds(budget) if budget else None)
    url = storage or storage_url(out)
    place = shown(url)
    if dry_run:
        looked = look_ahead(asked, url, out, duration_seconds(budget) if budget else None)
        return print(json.dumps(looked.data(), indent=2) if as_json else "\n".join(lines(looked)))
    code = 0
    try:
        places = plan_workers(workers, url, asked.device.partition(":")[0], replay=replay is not None)
        if len(places) > 1:
            code = _run_workers(places, url)
            found = Found(*_read(url))
        else:
            with terminated_as_interrupted(), progress(limit, quiet=quiet) as show:
                found = run(asked, url, out, show, limit, _command())
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        note(f"everything measured is kept in {place}; the same command continues")
        raise KeyboardInterrupt
    if as_json:
        return _print_json(place, found.studies, found.tilings)
    for result in found.studies:
        print_study(result)
    print_tilings(found.tilings)
    source = shlex.quote(place if storage else str(out))
    print(f"what was found, and how well it was predicted: ridgepoint study report {source}")
    print(f"export it: ridgepoint export --format native --study {source} --out deployment.yaml")
    if code:
        raise typer.Exit(code)


@study_app.command()
def show(source: Source, as_json: Json = False) -> None:
    """Show the trials, the Pareto front, the decision, and how well the predictions ranked what was measured."""
    from autotune.console import print_study, print_tilings

    studies, tilings = _read(source)
    if as_json:
        return _print_json(_place(source), studies, tilings)
    for result in studies:
        print_study(result)
    print_tilings(tilings)


@study_app.command()
def report(
    source: Source,
    out: Annotated[
        Path | None, typer.Option(help="Write the report to this file too: .html, .md or .txt, by its ending.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how good the predictions were by stage, where trials ended, what mattered, and what the model was worth."""
    from autotune.render import as_text, check_format, sections, write
    from autotune.report import info, study_report, tiling_report

    if out is not None:
        check_format(out)
    studies, tilings = _read(source)
    parts = sections([study_report(r) for r in studies], [tiling_report(t) for t in tilings])
    if out is not None:
        write(parts, out)
    if as_json:
        print(json.dumps({"storage": _place(source), **info(studies, tilings)}, indent=2))
    else:
        print(as_text(parts) if out is None else f"written: {out}")


def export(
    study: Annotated[str | None, typer.Option(help=_SOURCE)] = None,
    out: Annotated[
        Path | None, typer.Option(help="File or folder to write (default: deployment.yaml; others by format).")
    ] = None,
    target: Annotated[str, typer.Option("--format", help="One of those that --list prints.")] = "native",
    batch: Annotated[int | None, typer.Option(help="Only the buckets of this batch.")] = None,
    context: Annotated[int | None, typer.Option(help="Only the buckets of this context.")] = None,
    list_formats: Annotated[
        bool, typer.Option("--list", help="Print the formats: what reads each, and whether a release does.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write what tuning decided, with its evidence, in the format of the engine that will run it."""
    from autotune.console import print_decision, print_tilings
    from autotune.export.policy import Policy
    from autotune.export.targets import TARGETS, write

    if list_formats:
        return _list_formats(as_json)
    if target not in TARGETS:
        raise known("export format", target, TARGETS)
    if study is None:
        raise UserError("export needs --study, the folder, file or URL of a tuning run")
    studies, tilings = _read(study)
    policy = Policy(studies, tilings, _command()).select(batch, context)
    paths = write(target, policy, out or Path(TARGETS[target].out))
    if as_json:
        found = {"path": str(paths[0]), "paths": [str(p) for p in paths], "format": target, "studies": policy.names}
        return print(json.dumps(found, indent=2))
    for result in policy.studies:
        print_decision(result)
    print_tilings(policy.tilings)
    for path in paths:
        print(f"written: {path}")


def _list_formats(as_json: bool) -> None:
    from autotune.export.targets import TARGETS

    rows = [
        {"name": t.name, "engine": t.engine, "loads": t.loads, "file": t.file, "does": t.does} for t in TARGETS.values()
    ]
    if as_json:
        return print(json.dumps({"formats": rows}, indent=2))
    for row in rows:
        print(f"{row['name']} ({row['engine']}, {row['loads']}): {row['does']}; writes {row['file']}")


def _read(source: str) -> tuple[list[StudyResult], list[TilingResult]]:
    """Everything that is there; UserError when it is nothing."""
    from autotune.storage import read_studies
    from autotune.tiling_results import read_tilings_file
    from autotune.tiling_study import read_tilings

    if source.endswith(".json"):
        return [], read_tilings_file(source)
    tilings = read_tilings(source)
    return read_studies(source, least=0 if tilings else 1), tilings


def _place(source: str) -> str:
    """What was read, without a password."""
    from autotune.storage import shown, storage_url

    return source if source.endswith(".json") else shown(storage_url(source))


def _run_workers(places: Sequence[Mapping[str, str]], url: str) -> int:
    """This command once per place, each with that environment; the worst exit code. Their results are the study's.

    A command line can be read by every user of the machine, so the workers get the storage's URL by the environment.
    """
    from autotune.console import note
    from autotune.workers import run_workers

    words = _without(_without(sys.argv[1:], "--workers"), "--storage")
    program = Path(__file__).parents[1] / "ridgepoint.py"  # beside this package, in a checkout or installed
    command = [sys.executable, str(program), *words, "--workers", "1"]
    note(f"{len(places)} workers; `ridgepoint study show` shows what they have found so far")
    shared = {STORAGE_VARIABLE: url, COMMAND_VARIABLE: _command()}
    return run_workers([command] * len(places), [{**p, **shared} for p in places])


def _without(words: Sequence[str], option: str) -> list[str]:
    """Without an option and its value, however it was written."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option and not skip
    return kept


def _refuse(options: Sequence[str]) -> None:
    """Options that say what a recording has fixed."""
    if options:
        raise UserError(f"--{options[0]} is not taken with --replay: the recording says what was measured, and where")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(f"--{option} takes whole numbers with commas, but got {text!r}") from error
    if min(found) < 1 or len(set(found)) < len(found):
        raise UserError(f"--{option} takes different numbers >= 1, but got {text!r}")
    return found


def _counts(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(f"--acceptance-histogram takes numbers with commas, but got {text!r}") from error
    if min(found) < 0 or not 0 < sum(found) < math.inf:
        raise UserError(f"--acceptance-histogram takes counts >= 0, not all 0, but got {text!r}")
    return found


def _command() -> str:
    """The command as typed, for the record; passwords are left out."""
    from autotune.storage import hide_passwords

    typed = os.environ.get(COMMAND_VARIABLE)  # of the process that has started this worker
    return typed or shlex.join(["ridgepoint", *map(hide_passwords, sys.argv[1:])])


def _print_json(place: str, studies: Sequence[StudyResult], tilings: Sequence[TilingResult]) -> None:
    from autotune.results import summary
    from hardware.files import plain

    found = {"storage": place, "studies": [summary(r) for r in studies], "tilings": [plain(t) for t in tilings]}
    print(json.dumps(found, indent=2))
