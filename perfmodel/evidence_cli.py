"""`ridgepoint calibrate` and `validate`: what measurements say about predictions. Fitting is imported when used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hardware.files import UserError, known, plain, write_atomic
from hardware.profile import load_profile
from perfmodel.terminal import Json, ms, print_json, print_table, progress
from runtime.config import require

if TYPE_CHECKING:
    from perfmodel.experts import ExpertCoverage
    from perfmodel.published.evidence import Direction, Group, Result
    from perfmodel.validation import Summary
    from runtime.measurement import Measurement

EngineOption = Annotated[
    str | None, typer.Option(help="A known engine, or its YAML file (default: ours for the device and for what ran).")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to the root command."""
    app.command()(calibrate)
    app.command()(validate)


def calibrate(
    measurements: Annotated[
        Path | None, typer.Option(help="Our own measurements: a .jsonl file that `ridgepoint bench` wrote.")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="With --measurements: the device, or its YAML file.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The YAML file to write; with --published, or a folder (default: the working folder)."),
    ] = None,
    published: Annotated[
        str | None,
        typer.Option(help="Refit to measurements/published: kernels, one family of them, or an engine."),
    ] = None,
    engine: EngineOption = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="With --measurements: share of operating points not to fit to (default: 0)."),
    ] = None,
    expert_coverage: Annotated[
        str | None, typer.Option(help="With --measurements: recorded (default), or a coverage as for predict.")
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Bootstrap draws for the scales' intervals; 0: none.")] = 20,
    as_json: Json = False,
) -> None:
    """Fit few numbers to measurements, never per workload, and write them with where they came from.

    An engine's scales to our own measured forwards of one device; kernel families or an engine's host costs to
    published rows.
    """
    if published is not None:
        others = {"measurements": measurements, "hardware": hardware, "engine": engine}
        for name, value in {**others, "held-out": held_out, "expert-coverage": expert_coverage}.items():
            require(value is None, f"--{name} does not go with --published")
        return _calibrate_published(published, out, draws, as_json)
    require(measurements is not None, "either --measurements or --published is needed")
    require(hardware is not None, "--measurements needs --hardware, the device they were measured on")
    require(out is not None, "--measurements needs --out, the YAML file to write")
    assert measurements is not None and hardware is not None and out is not None  # what was just required
    coverage = expert_coverage or "recorded"
    _calibrate_ours(measurements, hardware, out, engine, held_out or 0.0, coverage, draws, as_json)


def _calibrate_ours(
    measurements: Path,
    hardware: str,
    out: Path,
    engine: str | None,
    held_out: float,
    expert_coverage: str,
    draws: int,
    as_json: bool,
) -> None:
    from perfmodel.calibration import calibrate as run
    from perfmodel.calibration import split
    from perfmodel.engine import engine_for, save_engine
    from perfmodel.validation import ran_by, summaries
    from perfmodel.validation import validate as check

    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"an engine's file name must end in .yaml, but is {out.name!r}")
    device = load_profile(hardware)
    rows = _read(measurements)
    kept, apart = split(rows, held_out)
    coverage = _coverage(expert_coverage, kept)  # what the rows apart counted is not known when they are predicted
    start = engine_for(device, engine, ran_by(rows))
    fitted = run(kept, device, start, source=measurements.name, expert_coverage=coverage, draws=draws)
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


def _calibrate_published(what: str, out: Path | None, draws: int, as_json: bool) -> None:
    from perfmodel.kernels.library import CLASSES
    from perfmodel.published import evidence, fits

    require(draws > 0, "--draws > 0 must hold for a published fit, whose file has intervals")
    one_file = out is not None and out.suffix in (".yaml", ".yml")
    folder = out is None or out.is_dir() or not out.suffix
    require(one_file or folder, f"--out must be a .yaml or .yml file, or a folder, but is {out}")
    points = evidence.fitted_points()
    families = fits.by_family(points)
    wanted = [f for f in families if f in CLASSES] if what == "kernels" else [what]
    if any(family not in families for family in wanted):
        raise known("family of published rows", what, ["kernels", *families])
    require(len(wanted) == 1 or not one_file, f"--out must be a folder for {len(wanted)} families, but is {out}")
    found = []
    for family in wanted:
        path = out if one_file and out is not None else (out or Path()) / f"{family}.yaml"
        bundled = fits.bundled_file(family)
        require(out is not None or path.resolve() != bundled.resolve(), f"{bundled} is bundled: name it with --out")
        with progress(f"fitting {family}"):
            fit = fits.fit_family([points[i] for i in families[family]], draws)
        write_atomic(path, fits.fitted_text(fit))
        found.append((path, fit))
    if as_json:
        return print_json([{"path": str(path), **plain(fit)} for path, fit in found])
    for path, fit in found:
        ends = fit.fitted.intervals
        print_table(
            f"{fit.family}, {fits.in_words(fit.fit)}",
            ("number", "fitted", "90% interval"),
            [(n, f"{v:.4g}", f"{ends[n][0]:.3g} .. {ends[n][1]:.3g}") for n, v in fit.fitted.values.items()],
        )
        print(f"written: {path}")


def validate(
    measurements: Annotated[
        Path | None, typer.Option(help="Our own measurements: a .jsonl file that `ridgepoint bench` wrote.")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="With --measurements: the device, or its YAML file.")] = None,
    engine: Annotated[str | None, typer.Option(help="With --measurements: an engine, or its YAML file.")] = None,
    expert_coverage: Annotated[
        str | None, typer.Option(help="With --measurements: recorded, or a coverage as for predict (default: uniform).")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(help="A .csv file with the columns of a table in measurements/published; nothing is fitted."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Without a file: hold the shipped rows out by point, series (default) or source.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare predictions with measurements: ours, any file of published rows, or the shipped rows held out of the fit.

    Rows that the numbers behind a prediction were fitted to are kept apart from others.
    """
    if measurements is not None:
        require(rows is None and split is None, "--measurements goes with neither --rows nor --split")
        require(hardware is not None, "--measurements needs --hardware, the device they were measured on")
        return _validate_ours(measurements, str(hardware), engine, expert_coverage or "uniform", as_json)
    for name, value in (("hardware", hardware), ("engine", engine), ("expert-coverage", expert_coverage)):
        require(value is None, f"--{name} goes with --measurements: a published row names what it ran on")
    require(rows is None or split is None, "--split refits the shipped rows, and --rows fits nothing: give one of them")
    _validate_published(rows, split or "series", as_json)


def _validate_ours(measurements: Path, hardware: str, engine: str | None, coverage_name: str, as_json: bool) -> None:
    from perfmodel.engine import engine_for
    from perfmodel.validation import SAMPLER, ran_by, summaries
    from perfmodel.validation import validate as run

    device = load_profile(hardware)
    every = _read(measurements)
    rows = [m for m in every if m.operator != SAMPLER]  # which follows a forward, and is predicted with whole steps
    require(len(rows) > 0, f"{measurements} has nothing but the sampler's times, which no forward has in it")
    coverage = _coverage(coverage_name, rows)
    used = engine_for(device, engine, ran_by(rows))
    found = run(rows, device, engine=used, expert_coverage=coverage)
    summary = summaries(found)
    if as_json:
        header: dict[str, Any] = {"hardware": device.name, "engine": used.name, "expert_coverage": str(coverage)}
        header["not_compared"] = len(every) - len(rows)
        return print_json(
            {**header, "summary": plain(summary), "rows": [{**plain(r), "error": r.error} for r in found]}
        )
    _print_summaries(summary)
    for label in sorted({r.simulated for r in found if r.simulated}):
        print(f"simulated: {label}")
    operators = [r for r in found if r.kind == "operator"]
    worst = sorted((r for r in found if r.kind != "operator"), key=lambda r: -abs(r.error))[:10]
    for title, shown in (("operators", operators), ("largest errors", worst)):
        if shown:
            print_table(
                title,
                ("point", "measured ms", "predicted ms", "bound ms", "error"),
                [
                    (r.name, ms(r.measured_seconds), ms(r.predicted_seconds), ms(r.bound_seconds), f"{r.error:+.0%}")
                    for r in shown
                ],
            )
    if len(every) > len(rows):
        print(f"not compared: {len(every) - len(rows)} rows of the sampler, which is no part of a forward")


def _validate_published(path: Path | None, split: str, as_json: bool) -> None:
    from perfmodel.published import evidence
    from perfmodel.published.fits import SPLITS
    from perfmodel.published.rows import read_rows

    if split not in SPLITS:
        raise known("split", split, SPLITS)
    if path is None:
        with progress(f"refitting without each {split}"):
            results = evidence.held_out_rows(evidence.shipped_rows(), split)
    else:
        results = evidence.predicted_rows(read_rows(path))
    groups, sign = evidence.summarise(results), evidence.direction(results)
    counts = evidence.statuses(results)
    if as_json:
        return print_json(
            {
                "source": "measurements/published" if path is None else str(path),
                "split": split if path is None else None,
                "summary": [plain(group) for group in groups],
                "direction": plain(sign),
                "statuses": counts,
                "below_bound": [
                    {"id": r.id, "measured": r.measured, "bound": r.bound, "unit": r.unit, "reason": r.exception}
                    for r in results
                    if r.below_bound
                ],
                "rows": [evidence.row_of(r) for r in results],
            }
        )
    _print_published(groups, sign, counts, results)


def _print_published(
    groups: Sequence[Group], sign: Direction, counts: dict[str, int], results: Sequence[Result]
) -> None:
    for by in dict.fromkeys(group.by for group in groups):
        print_table(
            f"predicted against measured, by {by}",
            (by, "fit", "rows", "median error", "mean error", "bias", "rank corr.", "in interval", "below bound"),
            [
                (
                    g.name,
                    g.fit,
                    str(g.count),
                    f"{g.median_absolute_error:.1%}",
                    f"{g.mean_absolute_error:.1%}",
                    f"{g.bias:+.1%}",
                    "" if g.rank_correlation is None else f"{g.rank_correlation:.2f}",
                    f"{g.coverage:.0%}",
                    str(len(g.below_bound)),
                )
                for g in groups
                if g.by == by
            ],
        )
    worst = sorted((r for r in results if r.point), key=lambda r: -abs(r.error))[:10]
    print_table(
        "largest errors",
        ("row", "of", "measured", "predicted", "unit", "error", "fit"),
        [
            (r.id, r.point.series, f"{r.measured:.4g}", f"{r.predicted:.4g}", r.unit, f"{r.error:+.0%}", r.fit or "")
            for r in worst
            if r.point
        ],
    )
    if sign.comparable:
        print(f"faster than autoregressive or not: right in {sign.right} of {sign.comparable} comparable rows")
    for r in results:
        if r.below_bound:
            why = r.exception or "unexplained"
            print(f"beyond its bound: {r.id}, {r.measured:g} {r.unit}, bound {r.bound:.4g}: {why}")
    print_table(
        "rows by status",
        ("status", "rows"),
        [(status.split("; known:")[0], str(count)) for status, count in counts.items()],
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
