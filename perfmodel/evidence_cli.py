"""`ridgepoint calibrate` and `validate`: what measurements say about predictions. Fitting is imported when used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hardware.files import UserError, plain
from hardware.profile import load_profile
from perfmodel.terminal import Json, ms, print_json, print_table

if TYPE_CHECKING:
    from perfmodel.experts import ExpertCoverage
    from perfmodel.validation import Summary
    from runtime.measurement import Measurement

HardwareOption = Annotated[str, typer.Option(help="A known device, or a profile's YAML file.")]
EngineOption = Annotated[
    str | None, typer.Option(help="A known engine, or its YAML file (default: ours for the kind of device).")
]
MeasurementsOption = Annotated[Path, typer.Option(help="A .jsonl file that `ridgepoint bench` wrote.")]
MeasuredCoverageOption = Annotated[
    str, typer.Option(help="recorded (what these rows counted), or a coverage as for predict.")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to the root command."""
    app.command()(calibrate)
    app.command()(validate)


def calibrate(
    measurements: MeasurementsOption,
    hardware: HardwareOption,
    out: Annotated[Path, typer.Option(help="The engine's YAML file to write.")],
    engine: EngineOption = None,
    held_out: Annotated[float, typer.Option(help="Share of the operating points not to fit to.")] = 0.0,
    expert_coverage: MeasuredCoverageOption = "recorded",
    as_json: Json = False,
) -> None:
    """Fit an engine's few scales to measured forwards of one device, and write the engine with where they came from."""
    from perfmodel.calibration import calibrate as run
    from perfmodel.calibration import split
    from perfmodel.engine import engine_for, save_engine
    from perfmodel.validation import summaries
    from perfmodel.validation import validate as check

    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"an engine's file name must end in .yaml, but is {out.name!r}")
    device = load_profile(hardware)
    rows = _read(measurements)
    kept, apart = split(rows, held_out)
    coverage = _coverage(expert_coverage, kept)  # what the rows apart counted is not known when they are predicted
    start = engine_for(device, engine)
    fitted = run(kept, device, start, source=measurements.name, expert_coverage=coverage)
    path = save_engine(fitted, out)
    found = summaries(check([*kept, *apart], device, engine=fitted, expert_coverage=coverage))
    if as_json:
        return print_json(
            {
                "path": str(path),
                "engine": fitted.name,
                "scale": fitted.scale,
                "points": len(fitted.fit.points) if fitted.fit else 0,
                "summary": plain(found),
            }
        )
    print_table(
        f"{fitted.name}, fitted to {measurements}",
        ("scale", "before", "after"),
        [(name, f"{start.scale_of(name):.3g}", f"{value:.3g}") for name, value in fitted.scale.items()],
    )
    _print_summaries(found)
    print(f"written: {path}")


def validate(
    measurements: MeasurementsOption,
    hardware: HardwareOption,
    engine: EngineOption = None,
    expert_coverage: MeasuredCoverageOption = "uniform",
    as_json: Json = False,
) -> None:
    """Compare predictions with measured forwards and generations; rows an engine was fitted to are kept apart."""
    from perfmodel.engine import engine_for
    from perfmodel.validation import summaries
    from perfmodel.validation import validate as run

    device = load_profile(hardware)
    rows = _read(measurements)
    coverage = _coverage(expert_coverage, rows)
    used = engine_for(device, engine)
    found = run(rows, device, engine=used, expert_coverage=coverage)
    summary = summaries(found)
    if as_json:
        header = {"hardware": device.name, "engine": used.name, "expert_coverage": str(coverage)}
        return print_json(
            {**header, "summary": plain(summary), "rows": [{**plain(r), "error": r.error} for r in found]}
        )
    _print_summaries(summary)
    for label in sorted({r.simulated for r in found if r.simulated}):
        print(f"simulated: {label}")
    worst = sorted(found, key=lambda r: -abs(r.error))[:10]
    print_table(
        "largest errors",
        ("point", "measured ms", "predicted ms", "bound ms", "error"),
        [
            (r.name, ms(r.measured_seconds), ms(r.predicted_seconds), ms(r.bound_seconds), f"{r.error:+.0%}")
            for r in worst
        ],
    )


def _read(path: Path) -> list[Measurement]:
    from runtime.measurement import read_jsonl

    return read_jsonl(path)


def _coverage(text: str, rows: Sequence[Measurement]) -> ExpertCoverage:
    from perfmodel.experts import parse_coverage
    from perfmodel.validation import recorded_coverage

    return recorded_coverage(rows) if text == "recorded" else parse_coverage(text)


def _print_summaries(found: dict[str, Summary]) -> None:
    print_table(
        "predicted against measured",
        ("rows", "count", "median error", "mean error", "bias", "below the bound"),
        [
            (
                name,
                str(s.count),
                f"{s.median_absolute_error:.1%}",
                f"{s.mean_absolute_error:.1%}",
                f"{s.bias:+.1%}",
                str(s.bound_violations),
            )
            for name, s in found.items()
        ],
    )
