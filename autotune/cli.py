"""`ridgepoint tune`, `study show` and `export`."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hardware.files import UserError
from runtime.config import ENGINES

if TYPE_CHECKING:
    from autotune.results import StudyResult, TrialRecord

study_app = typer.Typer(help="What tuning has measured so far.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add this package's commands to the root command."""
    app.command()(tune)
    app.add_typer(study_app, name="study")
    app.command()(export)


def tune(
    model: Annotated[str, typer.Option(help="A model that ships, or a checkpoint's folder.")] = "zaya-nano",
    batch: Annotated[str, typer.Option(help="Sequences decoded at once: numbers with commas, a study each.")] = "1",
    trials: Annotated[int, typer.Option(help="Settings to measure per batch, earlier runs included.")] = 24,
    seconds: Annotated[float | None, typer.Option(help="Stop searching a batch after this long, then decide.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the study and the probed profile.")] = Path("runs/tune"),
    storage: Annotated[
        str | None, typer.Option(help="Database URL of the study (default: study.db in the folder, SQLite).")
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
    prompts: Annotated[int, typer.Option(help="Held-out problems to decode, rounded up to whole batches.")] = 10,
    new_tokens: Annotated[int, typer.Option(help="Most tokens to generate for each problem.")] = 144,
    repeats: Annotated[int, typer.Option(help="Recorded passes over the problems in a trial.")] = 2,
    rounds: Annotated[int, typer.Option(help="Alternating rounds of the best setting against the default.")] = 8,
    hardware: Annotated[
        str | None, typer.Option(help="This machine's profile, for predictions (default: a quick probe, kept).")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Profile of the engine that is predicted, as ridgepoint-lean or the YAML file of a calibration; "
            "which engine runs is searched, or chosen by --engine of bench and generate."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    as_json: Json = False,
) -> None:
    """Search the fastest decoding settings on this machine. The same command again continues where it stopped."""
    if engine in ENGINES:
        raise UserError(
            "--engine of tune names a profile for the predictions, as ridgepoint-lean or a YAML file, but got "
            f"{engine!r}, which runs models: --engine of bench and generate takes it"
        )
    from autotune.local import Plan, load, machine_profile, tune_local
    from autotune.storage import shown, storage_url
    from hardware.profile import load_profile

    batches = _batches(batch)
    plan = Plan(
        prompts=prompts,
        new_tokens=new_tokens,
        trials=trials,
        seconds=seconds,
        lossless=lossless,
        max_divergence=max_divergence,
        repeats=repeats,
        rounds=rounds,
        seed=seed,
        histogram=_counts(histogram) if histogram else (),
    )
    url = storage or storage_url(out)
    place = shown(url)
    command = _command()
    tuned = load(model)
    results = []
    try:
        with _progress() as show:
            profile = (
                load_profile(hardware)
                if hardware
                else machine_profile(out / "hardware.yaml", lambda label, share: show("probing", share, label))
            )
            for size in batches:

                def on_trial(trial: TrialRecord, done: int, size: int = size) -> None:
                    show(f"batch {size}", done / trials, f"{done} of {trials} settings; last: {_speed(trial)}")

                results.append(
                    tune_local(
                        tuned,
                        url,
                        size,
                        profile,
                        plan,
                        engine=engine,
                        command=command,
                        on_trial=on_trial,
                        on_compare=lambda share: show("deciding", share, "best against default, alternating"),
                    )
                )
    except KeyboardInterrupt:
        print(f"every finished trial is kept in {place}; the same command continues", file=sys.stderr)
        raise
    if as_json:
        return _print_json(place, results)
    for result in results:
        _print_study(result)
    source = shlex.quote(place if storage else str(out))
    print(f"export it: ridgepoint export --format native --study {source} --out deployment.yaml")


@study_app.command()
def show(
    source: Annotated[str, typer.Argument(help="The folder, the SQLite file or the database URL of a tuning run.")],
    as_json: Json = False,
) -> None:
    """Show the trials, the Pareto front, the decision, and how well the predictions ranked what was measured."""
    from autotune.storage import read_studies, shown, storage_url

    results = read_studies(source)
    if as_json:
        return _print_json(shown(storage_url(source)), results)
    for result in results:
        _print_study(result)


def export(
    study: Annotated[str, typer.Option(help="The folder, the SQLite file or the database URL of a tuning run.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("deployment.yaml"),
    target: Annotated[str, typer.Option("--format", help="native: what runtime.generate follows.")] = "native",
    as_json: Json = False,
) -> None:
    """Write what tuning decided, with its evidence, in the format of the engine that will run it."""
    from autotune.export.targets import TARGETS
    from autotune.export.targets import export as write
    from autotune.storage import read_studies
    from hardware.files import known

    if target not in TARGETS:
        raise known("export format", target, TARGETS)
    results = read_studies(study)
    path = write(target, results, out, _command())
    if as_json:
        return print(json.dumps({"path": str(path), "format": target, "studies": [r.name for r in results]}, indent=2))
    for result in results:
        _print_decision(result)
    print(f"written: {path}")


def _batches(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--batch takes whole numbers with commas, but got {text!r}") from error
    if min(found) < 1 or len(set(found)) < len(found):
        raise UserError(f"--batch takes different numbers >= 1, but got {text!r}")
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
    """The command as typed, for the record; passwords in URLs are left out."""
    return shlex.join(["ridgepoint", *(re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", word) for word in sys.argv[1:])])


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on stderr: call it with a label, the share done, and a remark."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[remark]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("starting", total=1.0, remark="")

        def update(label: str, share: float, remark: str) -> None:
            progress.update(bar, description=label, completed=min(share, 1.0), remark=remark)

        yield update


def _speed(trial: TrialRecord) -> str:
    known = trial.tokens_per_second
    return trial.outcome or "" if known is None else f"{known:.0f} tokens/s"


def _print_json(place: str, results: list[StudyResult]) -> None:
    from autotune.results import summary

    print(json.dumps({"storage": place, "studies": [summary(r) for r in results]}, indent=2))


def _print_study(result: StudyResult) -> None:
    """The measured settings, the fastest first; those on the Pareto front are marked."""
    front = {t.number for t in result.front()}
    print(f"{result.name}: {len(result.measured)} settings on {result.subject.device['device']}")
    print("   trial  tokens/s  predicted  differs  accepts  setting")
    for t in sorted(result.measured, key=lambda t: -(t.tokens_per_second or 0.0)):
        setting = " ".join(f"{name}={value}" for name, value in t.params.items())
        predicted = _cell(t.predicted_tokens_per_second, ".0f")
        numbers = f"{_cell(t.tokens_per_second, '.0f'):>8}  {predicted:>9}  {_cell(t.divergence, '.2%'):>7}"
        remark = "" if t.outcome == "correct" else f"  ({t.outcome}: {t.reason})"
        mark = "*" if t.number in front else " "
        print(f" {mark} {t.number:5}  {numbers}  {_cell(t.acceptance_length, '.2f'):>7}  {setting}{remark}")
    rank = result.rank_correlation()
    if rank is not None:
        print(f"predictions: rank correlation {rank:.2f} over {len(result.scored())} settings")
    _print_decision(result)


def _print_decision(result: StudyResult) -> None:
    decision = result.decision
    if decision is None:
        return print(f"{result.name}: not decided yet")
    line = f"{result.name}: trial {decision.trial}" + (" (the default)" if decision.kept_default else "")
    found = decision.comparison
    if found:
        line += f"; trial {decision.challenger} against the default: {found.ratio:.2f}x"
        line += f" [{found.low:.2f}, {found.high:.2f}] in {found.rounds} rounds"
    print(f"{line}; {decision.reason}")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
