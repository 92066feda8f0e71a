"""Predictions of published rows: units, bounds, what was fitted, and the commands that print them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ridgepoint
from dashboards.pairs import ROWS, published, published_text
from hardware.files import UserError
from hardware.profile import load_profile, save_profile
from perfmodel.engine import load_engine
from perfmodel.kernels.library import CLASSES, load_library
from perfmodel.published import evidence, fits
from perfmodel.published.evidence import FOLDER, Group, Result, direction, held_out_rows, predicted_rows, summarise
from perfmodel.published.interpret import interpret
from perfmodel.published.names import Catalog
from perfmodel.published.points import KernelPoint, Point, ServedPoint
from perfmodel.published.predict import PREDICTORS, Estimate, estimate
from perfmodel.published.rows import Row, read_rows
from perfmodel.terminal import print_table
from tests.test_published import ATTENTION, GEMM, MOE, REDUCE, SERVED, TIDAR, row_of, write

KERNELS = (GEMM, MOE, ATTENTION, REDUCE)


def predicted(cells: dict[str, str], **changes: str) -> Result:
    (result,) = predicted_rows([row_of(cells | changes)])
    assert result.status == "predicted", result.status
    return result


@cache
def of_family(family: str) -> list[Row]:
    """The shipped rows of one kernel family."""
    catalog = Catalog()
    return [
        row
        for row in read_rows(FOLDER / "gpu_measured.csv")
        if isinstance(point := interpret(row, catalog), KernelPoint) and point.family == family
    ]


def numbers(result: Result) -> list[float]:
    values = (result.measured, result.predicted, result.bound, result.low, result.high)
    return [value for value in values if value is not None]


@pytest.mark.parametrize("cells", [*KERNELS, SERVED], ids=lambda c: c["model_or_op"])
def test_a_time_has_a_bound_below_its_estimate_and_an_interval_around_it(cells: dict[str, str]) -> None:
    found = predicted(cells)
    _, estimated, bound, low, high = numbers(found)
    assert 0 < bound < estimated and low < estimated < high
    assert math.log(estimated / low) == pytest.approx(math.log(high / estimated))


def test_a_rate_s_bound_lies_above_it() -> None:
    found = predicted(GEMM, metric="tflops", unit="TFLOPS", value="10")
    _, estimated, bound, low, high = numbers(found)
    assert low < estimated < high and estimated < bound <= 989


def test_a_row_in_another_unit_has_the_same_error() -> None:
    """Microseconds and milliseconds alike; a rate is exactly the inverse of its time."""
    micro, milli = predicted(GEMM), predicted(GEMM, value="0.0125", unit="ms")
    assert milli.error == pytest.approx(micro.error)
    assert numbers(milli) == pytest.approx([value / 1000 for value in numbers(micro)])
    flops = 2 * 16 * 4096 * 2048
    rate = predicted(GEMM, metric="tflops", unit="TFLOPS", value=repr(flops / 12.5e-6 / 1e12))
    assert 1 + rate.error == pytest.approx(1 / (1 + micro.error))
    user = predicted(SERVED, metric="decode_tokens_per_s_per_user", unit="tok/s/user", value="50")
    assert 1 + user.error == pytest.approx(1 / (1 + predicted(SERVED).error))


def test_a_row_beyond_datasheet_peaks_is_found_in_either_unit() -> None:
    time, rate = predicted(GEMM), predicted(GEMM, metric="tflops", unit="TFLOPS", value="1")
    assert time.bound is not None and rate.bound is not None
    assert not time.below_bound and not rate.below_bound
    doctored = [
        row_of(GEMM | {"value": repr(time.bound * 0.99)}),
        row_of(GEMM | {"id": "r", "metric": "tflops", "unit": "TFLOPS", "value": repr(rate.bound * 1.01)}),
    ]
    results = predicted_rows(doctored)
    assert [r.below_bound for r in results] == [True, True]
    group = next(g for g in summarise(results) if g.by == "operator")
    assert group.below_bound == ("g", "r")


@given(st.sampled_from([*KERNELS, SERVED, TIDAR]), st.floats(1e-9, 1e15), st.lists(st.integers(1, 10**12), min_size=4))
def test_whatever_the_sizes_a_result_is_finite_or_has_a_reason(
    cells: dict[str, str], value: float, sizes: list[int]
) -> None:
    """Every number in the cells that say sizes replaced, and any value."""
    shown = iter(sizes * 8)
    odd = {c: re.sub(r"\d+", lambda _: str(next(shown)), cells[c]) for c in ("batch", "context_or_shape") if c in cells}
    (found,) = predicted_rows([row_of(cells | odd | {"value": repr(value)})])
    assert all(math.isfinite(x) and x > 0 for x in numbers(found))
    json.dumps([evidence.row_of(found), [dataclasses.asdict(g) for g in summarise([found])]], allow_nan=False)


def test_what_a_device_cannot_do_is_a_status() -> None:
    (result,) = predicted_rows([row_of(GEMM | {"hardware": "A100 SXM 80GB", "dtype": "fp8"})])
    assert "fp8" in result.status and result.predicted is None and result.measured == 12.5


def test_a_model_that_does_not_fit_is_a_status() -> None:
    row = row_of(SERVED | {"hardware": "RTX 4090", "engine": "vllm TP1"})
    assert "must fit" in predicted_rows([row])[0].status


def test_rows_together_are_predicted_as_each_alone() -> None:
    """Served rows that differ in sizes alone are timed in one call; one that does not fit costs the others nothing."""
    sizes = [{"batch": str(batch)} for batch in (1, 2, 64)]
    cells = [*(SERVED | size for size in sizes), *KERNELS, TIDAR]
    fitting = [row_of(row | {"id": str(i)}) for i, row in enumerate(cells)]
    large = row_of(SERVED | {"id": "large", "context_or_shape": "ISL/OSL 1000000/512"})
    alone = [predicted_rows([row])[0] for row in (*fitting, large)]
    assert [result.status for result in alone[:-1]] == ["predicted"] * len(fitting) and alone[-1].status != "predicted"
    assert predicted_rows([*fitting, large]) == alone
    assert [numbers(r) for r in predicted_rows(fitting)] == [pytest.approx(numbers(r)) for r in alone[:-1]]


def test_devices_of_one_name_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """A row may name a file, and that may give its device the name of a bundled one."""
    bundled, file = load_profile("h200"), tmp_path / "mine.yaml"
    save_profile(dataclasses.replace(bundled, compute_units=bundled.compute_units // 4), file)
    rows = [row_of(SERVED | {"hardware": device}) for device in ("2xH200 SXM", f"2x{file}")]
    alone = [predicted_rows([row])[0] for row in rows]
    assert {r.status for r in alone} == {"predicted"} and alone[0].predicted != alone[1].predicted
    assert predicted_rows(rows) == alone


def test_every_type_of_point_has_a_predictor_and_a_fit() -> None:
    def leaves(kind: type[Point]) -> Sequence[type[Point]]:
        below = kind.__subclasses__()
        return [leaf for child in below for leaf in leaves(child)] if below else [kind]

    assert set(PREDICTORS) == set(fits.PROBLEMS) == set(leaves(Point))


def test_rows_that_were_fitted_are_told_from_others() -> None:
    (row,) = [row for row in of_family("elementwise") if row.id == "B0351"]
    assert row.value is not None
    other = dataclasses.replace(row, id="new", cells={**row.cells, "id": "new"})
    elsewhere = dataclasses.replace(row, cells={**row.cells, "engine": "another"})  # the same id in another file
    changed = dataclasses.replace(row, value=row.value * 2)
    states = ["fitted", "not fitted (its series fitted)", "not fitted", "not fitted (its series fitted)"]
    results = predicted_rows([row, other, elsewhere, changed])
    assert [r.fit for r in results] == states
    assert {g.fit for g in summarise(results)} == {*states}


def test_without_the_tables_nobody_knows_what_was_fitted(tmp_path: Path) -> None:
    (result,) = predicted_rows([row_of(GEMM)], folder=tmp_path)
    assert result.fit == "unknown"


def test_rows_that_are_suspected_are_in_no_fit() -> None:
    odd = evidence.Oddities()
    suspected = [row for row in evidence.shipped_rows() if "SUSPECT" in row.cells.get("notes", "")]
    assert len(suspected) > 5 and all("SUSPECT" in str(odd.of(row)) for row in suspected)
    fitted = evidence.fitted_rows()
    assert fitted is not None and len(fitted) > 400
    assert not {name for name, _, _ in fitted} & {row.id for row in suspected}


def test_a_committed_exception_is_the_reason_of_a_violation(tmp_path: Path) -> None:
    (tmp_path / "exceptions.csv").write_text("id,reason\ng,cache-warm at the source\n")
    (result,) = predicted_rows([row_of(GEMM | {"value": "0.001"})], folder=tmp_path)
    assert result.below_bound and result.exception == "cache-warm at the source"


def doctored(rows: list[Row], series: str, factor: float) -> list[Row]:
    """The rows with all values of one series changed."""
    return [
        dataclasses.replace(row, value=row.value * factor) if row.series == series and row.value else row
        for row in rows
    ]


@pytest.mark.parametrize("family", ["attention", "moe"])
def test_a_held_out_series_says_nothing_about_itself(family: str) -> None:
    """Its own predictions do not change when its values do, and others' do."""
    rows = of_family(family)
    series = rows[0].series
    honest = {r.id: r for r in held_out_rows(rows, "series")}
    changed = {r.id: r for r in held_out_rows(doctored(rows, series, 3.0), "series")}
    own = [row.id for row in rows if row.series == series]
    others = [row.id for row in rows if row.series != series]
    assert {honest[i].fit for i in own} == {"held out by series"}
    assert all(changed[i].predicted == honest[i].predicted for i in own)
    assert any(changed[i].predicted != honest[i].predicted for i in others)


def test_a_point_that_is_held_out_alone_is_predicted_by_its_series() -> None:
    rows = of_family("attention")
    first = rows[0].id
    alone = {r.id: r.predicted for r in held_out_rows(rows, "point")}
    changed = [dataclasses.replace(r, value=r.value * 3) if r.id == first and r.value else r for r in rows]
    again = {r.id: r.predicted for r in held_out_rows(changed, "point")}
    assert again[first] == alone[first]


def test_the_one_series_of_an_engine_is_fitted_to_nothing() -> None:
    rows = [row for row in evidence.shipped_rows() if row.cells.get("engine", "").startswith("sglang 0.5.6.post2")]
    results = [*held_out_rows(rows, "series"), *predicted_rows(rows)]
    assert {r.fit for r in results if r.status == "predicted"} == {"not fitted"}


def test_a_lone_group_cannot_be_held_out() -> None:
    rows = [row for row in of_family("moe") if "aiconfigurator" in row.cells["source_url"]]
    assert {r.fit for r in held_out_rows(rows, "source")} == {"fitted (its family has no other source)"}


def test_tidar_runs_have_one_source_and_served_rows_hold_out_the_engine() -> None:
    """Four files of one repository are one publisher's; and kernels below an engine may be fitted to its sources."""
    rows = read_rows(FOLDER / "zaya_tidar_measured.csv")
    assert {row.source for row in rows} == {"Zyphra/vllm"}
    told = {r.fit for r in held_out_rows(rows, "source") if r.status == "predicted"}
    assert "fitted (its family has no other source)" in told and not any("held out" in str(fit) for fit in told)
    catalog = Catalog()
    served = [
        row
        for row in read_rows(FOLDER / "gpu_measured.csv")
        if isinstance(point := interpret(row, catalog), ServedPoint) and point.engine == "vllm"
    ]
    few = [row for source in {row.source for row in served} for row in [r for r in served if r.source == source][:4]]
    told = {r.fit for r in held_out_rows(few, "source") if r.status == "predicted"}
    assert "engine held out by source" in told and "held out by source" not in told


def test_an_interval_says_nothing_about_its_own_series(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from the errors of others: with predictions that stay, its own series' values cannot widen it."""
    monkeypatch.setattr("perfmodel.fitting.held_out", lambda problem, _: np.full(len(problem.measured), 1e-4))
    rows = of_family("attention")
    series = rows[0].series

    def width(rows: list[Row]) -> float:
        (found,) = {math.log(r.high / r.low) for r in held_out_rows(rows, "series") if own(r) and r.high and r.low}
        return found

    def own(result: Result) -> bool:
        return result.point is not None and result.point.series == series

    changed = rows
    for other in {row.series for row in rows} - {series}:
        changed = doctored(changed, other, 1e6)
    assert width(doctored(rows, series, 1e6)) == pytest.approx(width(rows))
    assert width(changed) > 1.01 * width(rows)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="point, series, source"):
        fits.groups([], "row")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "operators", "limit"),
    [
        ("gemm", ("gemm bfloat16",), 0.14),
        ("moe", ("moe bfloat16", "moe fp8", "moe mxfp4 x bfloat16", "moe nvfp4"), 0.20),
        ("attention", ("attention bfloat16 cache", "attention fp8 cache"), 0.15),
    ],
)
def test_kernels_are_predicted_for_series_that_no_fit_has_seen(
    family: str, operators: tuple[str, ...], limit: float
) -> None:
    results = held_out_rows(of_family(family), "series")
    errors = [abs(r.error) for r in results if r.point and r.point.operator in operators]
    assert len(errors) > 50
    assert np.mean(errors) <= limit
    assert all(r.fit == "held out by series" for r in results)
    committed = {pair.id: pair.predicted for pair in published().pairs}  # docs/accuracy/rows.csv
    assert {r.id: committed[r.id] for r in results} == pytest.approx({r.id: r.predicted for r in results}, rel=1e-3)


def test_the_shipped_fits_are_of_the_shipped_rows() -> None:
    """A row that is read in another way, or not at all, needs another fit."""
    points = evidence.fitted_points()
    for family, members in fits.by_family(points).items():
        count, series = len(members), len({points[i].series for i in members})
        if family in CLASSES:
            fit = load_library().evidence[family].fit
            assert (fit.rows, fit.series) == (count, series), family
        else:
            assert f"fitted to {count} rows of {series} series" in load_engine(family).sources["hosts"]


@pytest.fixture(scope="module")
def as_shipped() -> list[Result]:
    """All shipped rows by the shipped numbers."""
    return predicted_rows(evidence.shipped_rows())


def test_no_shipped_row_is_beyond_datasheet_peaks_unexplained(as_shipped: list[Result]) -> None:
    assert sum(r.status == "predicted" for r in as_shipped) > 500
    assert [(r.id, r.measured, r.bound) for r in as_shipped if r.below_bound and r.exception is None] == []


def test_the_committed_rows_are_those_of_the_present_model(as_shipped: list[Result]) -> None:
    """By the shipped numbers, as a refit takes too long here. `python -m benchmarks.accuracy` writes the file."""
    fresh = list(csv.DictReader(io.StringIO(published_text(as_shipped, as_shipped))))
    with ROWS.open(encoding="utf-8", newline="") as stream:
        committed = list(csv.DictReader(stream))
    refitted = {"predicted", "fit", "low", "high", "predicted_seconds", "low_seconds", "high_seconds"}
    for line, again in zip(committed, fresh, strict=True):
        for name in line.keys() - refitted:
            same = line[name] == again[name] or abs(float(line[name]) / float(again[name]) - 1) < 1e-4
            assert same, (line["id"], name, line[name], again[name])


def result(measured: float, predicted: float, width: float = 0.1, **changes: str) -> Result:
    point = interpret(row_of(GEMM | changes))
    assert not isinstance(point, str)
    low, high = predicted * (1 - width), predicted * (1 + width)
    return Result(point.id, "predicted", "us", measured, predicted, 0.01, low, high, "not fitted", None, point)


def test_a_summary_of_known_errors() -> None:
    rows = [result(10, 11), result(20, 18), result(30, 36), result(40, 40)]
    group = next(g for g in summarise(rows) if g.by == "operator")
    assert (group.count, group.name, group.fit) == (4, "gemm bfloat16", "not fitted")
    assert group.mean_absolute_error == pytest.approx((0.1 + 0.1 + 0.2 + 0) / 4)
    assert group.median_absolute_error == pytest.approx(0.1)
    assert group.bias == pytest.approx(0.05)
    assert group.rank_correlation == pytest.approx(1.0)
    assert group.coverage == pytest.approx(2 / 4)  # 11 +- 1.1 holds 10, but 18 +- 1.8 does not hold 20
    turned = next(g for g in summarise([result(1, 3), result(2, 2), result(3, 1)]) if g.by == "device")
    assert turned.rank_correlation == pytest.approx(-1.0)


def test_a_summary_is_by_every_dimension_and_leaves_reasons_out() -> None:
    rows = [result(1, 1), Result("x", "the batch is not stated", "us", 1.0)]
    groups = summarise(rows)
    assert [g.by for g in groups] == ["family", "operator", "source", "device", "engine"]
    assert all(isinstance(g, Group) and g.count == 1 and g.rank_correlation is None for g in groups)
    assert evidence.statuses(rows) == {"predicted": 1, "the batch is not stated": 1}


def run(name: str, mode: str, measured: float, predicted: float, batch: str = "8") -> Result:
    cells = TIDAR | {"id": name, "mode": mode, "batch": batch, "value": repr(measured)}
    if mode == "autoregressive":
        cells |= {"draft_tokens": "", "mean_acceptance_length": ""}
    point = interpret(row_of(cells))
    assert not isinstance(point, str), point
    return Result(name, "predicted", "tok/s", measured, predicted, 1e9, 0, 1e9, "not fitted", None, point)


def test_directions_are_compared_within_a_run_device_and_batch() -> None:
    rows = [
        run("mt5k-greedy-h100-ar-b8", "autoregressive", 500, 450),
        run("mt5k-greedy-h100-tf-b8", "two_forward", 900, 1000),  # faster, as predicted
        run("mt5k-greedy-h100-ar-b64", "autoregressive", 3000, 2000, "64"),
        run("mt5k-greedy-h100-tf-b64", "two_forward", 2500, 2600, "64"),  # slower, but predicted faster
        run("mt2k-h100-tf-b8", "two_forward", 700, 700),  # of another run: nothing to compare with
    ]
    found = direction(rows)
    assert (found.comparable, found.right, found.wrong) == (2, 1, ("mt5k-greedy-h100-tf-b64",))


def test_the_command_predicts_any_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [GEMM, SERVED | {"id": "s"}, GEMM | {"id": "h", "hardware": "H100"}, GEMM | {"id": "b", "value": "?"}]
    path = write(tmp_path / "rows.csv", *rows)
    assert ridgepoint.main(["validate", "--rows", str(path), "--json"]) == 0
    text, progress = capsys.readouterr()
    document = json.loads(text)
    assert progress == ""
    by_id = {row["id"]: row for row in document["rows"]}
    assert list(by_id) == ["g", "s", "h", "b"]
    for name in ("g", "s"):
        assert by_id[name]["status"] == "predicted" and by_id[name]["fit"] == "not fitted"
        assert all(by_id[name][key] > 0 for key in ("measured", "predicted", "bound", "low", "high"))
    assert "SXM, PCIe or NVL" in by_id["h"]["status"] and by_id["h"]["predicted"] is None
    assert by_id["h"]["measured"] == 12.5
    assert "value must be a number" in by_id["b"]["status"] and by_id["b"]["measured"] is None
    assert {group["by"] for group in document["summary"]} == {"family", "operator", "source", "device", "engine"}
    assert document["statuses"]["predicted"] == 2
    assert ridgepoint.main(["validate", "--rows", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "by operator" in shown and "rows by status" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "none.csv"], "cannot read none.csv"),
        (["--rows", "none.csv", "--split", "point"], "--rows fits nothing"),
        (["--split", "row"], "unknown split 'row'; known: point, series, source"),
        (["--measurements", "x.jsonl"], "--measurements needs --hardware"),
        (["--measurements", "x.jsonl", "--rows", "y.csv"], "neither --rows nor --split"),
        (["--hardware", "h100-sxm"], "--hardware goes with --measurements"),
    ],
)
def test_validate_refuses_what_does_not_go_together(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ridgepoint.main(["validate", *arguments]) == 2
    text, error = capsys.readouterr()
    assert text == "" and message in error and error.count("\n") == 1


def test_a_family_is_refitted_to_a_file_that_can_replace_the_bundled_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hardware.files import build, read_yaml
    from perfmodel.kernels.attention import AttentionKernels
    from perfmodel.kernels.library import Evidence

    arguments = ["calibrate", "--published", "attention", "--draws", "3", "--out", str(tmp_path), "--json"]
    assert ridgepoint.main(arguments) == 0
    (document,) = json.loads(capsys.readouterr().out)
    data = read_yaml(tmp_path / "attention.yaml")
    kernels = build(AttentionKernels, data.pop("numbers"), "numbers")
    known = build(Evidence, data, "evidence")
    assert document["path"] == str(tmp_path / "attention.yaml")
    assert known.fit.rows > 50 and known.fit.held_out_mean_error < 0.15
    assert set(known.intervals) == set(vars(kernels))
    assert kernels.bandwidth_share == pytest.approx(load_library().attention.bandwidth_share, rel=0.2)


def test_an_engine_is_refitted_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    assert ridgepoint.main(["calibrate", "--published", "gpt-fast", "--draws", "3", "--out", str(path)]) == 0
    assert f"written: {path}" in capsys.readouterr().out
    found = load_engine(path)
    assert found.spread is not None and "held" not in found.sources["hosts"] and "rows" in found.sources["hosts"]
    assert found.hosts["default"].forward_seconds > 0 and "default.forward_seconds" in found.intervals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --measurements or --published"),
        (["--published", "conv"], "unknown family of published rows 'conv'; known:"),
        (["--published", "moe", "--hardware", "b200"], "--hardware does not go with --published"),
        (["--published", "kernels", "--out", "x.yaml"], "--out must be a folder"),
        (["--published", "moe", "--draws", "0"], "--draws > 0"),
        (["--published", "moe", "--held-out", "0.5"], "--held-out does not go with --published"),
        (["--published", "moe", "--expert-coverage", "recorded"], "--expert-coverage does not go with --published"),
        (["--published", "moe", "--out", "e.json"], "a .yaml or .yml file, or a folder, but is e.json"),
        (["--published", "moe", "--out", "e.YAML"], "a .yaml or .yml file, or a folder, but is e.YAML"),
        (["--measurements", "x.jsonl"], "--measurements needs --hardware"),
        (["--measurements", "x.jsonl", "--hardware", "b200"], "--measurements needs --out"),
    ],
)
def test_calibrate_refuses_what_does_not_go_together(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ridgepoint.main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bundled_files_are_not_overwritten_by_chance(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    bundled = fits.bundled_file("moe")
    before = bundled.read_text()
    monkeypatch.chdir(bundled.parent)
    assert ridgepoint.main(["calibrate", "--published", "moe", "--draws", "2"]) == 2
    assert "is bundled" in capsys.readouterr().err
    assert bundled.read_text() == before


def test_the_shipped_tables_are_read_whole() -> None:
    for name in evidence.TABLES:
        with (FOLDER / name).open(newline="", encoding="utf-8") as stream:
            lines = list(csv.DictReader(stream))
        rows = read_rows(FOLDER / name)
        assert len(rows) == len(lines) and all(row.problem is None for row in rows)


def test_one_row_beyond_all_measure_is_its_own_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = "hidden 999999999999, inter 99999999999, E{} top3, tokens=4, {}"
    rows = [
        MOE | {"id": "e", "batch": "4", "context_or_shape": huge.format(999999999, "power_law_1.2")},
        MOE | {"id": "a", "batch": "4", "context_or_shape": huge.format(8, "power_law_400")},
        GEMM,
    ]
    path = write(tmp_path / "rows.csv", *rows)
    assert ridgepoint.main(["validate", "--rows", str(path), "--json"]) == 0
    text, errors = capsys.readouterr()
    assert [row["status"] == "predicted" for row in json.loads(text)["rows"]] == [False, False, True]
    assert errors == ""


@pytest.mark.parametrize(
    "outcome",
    [OverflowError(), MemoryError(), FloatingPointError(), ZeroDivisionError()]
    + [Estimate(seconds, bound, 0.1) for seconds in (math.nan, math.inf, 0.0, -1.0, 1e308) for bound in (0.0, 1e-9)]
    + [Estimate(1.0, math.nan, 0.1), Estimate(1.0, math.inf, 0.1), Estimate(1.0, 0.5, 800.0)],
)
def test_what_cannot_be_calculated_is_no_prediction(outcome: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def predictor(_: object) -> object:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setitem(PREDICTORS, KernelPoint, predictor)  # type: ignore[arg-type]
    (result,) = predicted_rows([row_of(GEMM)])
    assert result.status == "its sizes are beyond what can be calculated" and result.predicted is None


def test_a_row_that_overflows_while_it_is_read_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(*_: object) -> None:
        raise OverflowError

    monkeypatch.setattr("perfmodel.published.interpret.loads_of", overflow)
    assert interpret(row_of(MOE)) == "its sizes are beyond what can be calculated"


def test_brackets_in_cells_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in "vLLM 0.24.0 [torch]": neither swallowed as markup nor, as "[/x]", an error."""
    rows = [GEMM | {"id": "[/x]", "engine": "vLLM [torch.mm]"}, GEMM | {"id": "b", "hardware": "[/red]"}]
    path = write(tmp_path / "rows.csv", *rows)
    assert ridgepoint.main(["validate", "--rows", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "[/x]" in shown and "[torch.mm]" in shown and "[/red]" in shown
    print_table("of [b]", ("a [c]",), [("[bold]d",)])
    shown = capsys.readouterr().out
    assert "of [b]" in shown and "a [c]" in shown and "[bold]d" in shown


def test_an_estimate_of_no_bound_has_none() -> None:
    point = interpret(row_of(GEMM))
    assert not isinstance(point, str)
    assert Estimate(1e-6, 0.0, 0.1).in_unit(point)[1] is None
    assert isinstance(estimate(point), Estimate)
