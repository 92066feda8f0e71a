"""Predictions beside measurements: what each source gives, the figures' data, and the second page."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import streamlit
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from dashboards.comparison import (
    BYS,
    FILTERS,
    ComparisonView,
    chosen,
    comparison_info,
    comparison_plot,
    described,
    errors_columns,
    errors_info,
    errors_plot,
    known_view,
    options,
)
from dashboards.pairs import COLUMNS, FITS, KINDS, ROOT, Pair, joined, published, rows_of_file
from dashboards.published_models import FAMILIES, models_columns, models_info
from dashboards.record_files import local_files, our_files
from dashboards.records import fits, predicted_folders, uploaded_records
from hardware.files import UserError
from hardware.profile import load_profile
from perfmodel.published.evidence import FOLDER, predicted_rows
from perfmodel.published.rows import parse_rows
from tests.test_published import GEMM, SERVED

OURS = ROOT / "measurements" / "amd-epyc-2-cores"


def pair(**changes: Any) -> Pair:
    """A pair that was predicted 10% too slow, each of its texts like the field's name."""
    texts = {f.name: f.name for f in dataclasses.fields(Pair)}
    numbers = {"measured": 10.0, "predicted": 11.0, "measured_seconds": 1e-5, "predicted_seconds": 1.1e-5}
    none = dict.fromkeys(
        "bound low high bound_seconds low_seconds high_seconds simulated exception measured_by predicted_by url".split()
    )
    given: dict[str, Any] = {**texts, **numbers, **none, "record": (), "kind": "ours", "fit": "held out", **changes}
    return Pair(**given)


pairs = st.builds(
    pair,
    id=st.text(max_size=3),
    kind=st.sampled_from(KINDS),
    fit=st.sampled_from(FITS),
    device=st.sampled_from("abc"),
    operator=st.text(max_size=2),
    measured_seconds=st.floats(1e-9, 1e3),
    predicted_seconds=st.floats(1e-9, 1e3),
    high_seconds=st.none() | st.floats(1e-9, 1e3),
    simulated=st.none() | st.just("random weights"),
)
views = st.builds(
    ComparisonView,
    kinds=st.lists(st.sampled_from(KINDS), max_size=2).map(tuple),
    devices=st.lists(st.sampled_from("abcd"), max_size=2).map(tuple),
    point=st.text(max_size=3),
)


# --- figures


@settings(max_examples=20, deadline=None)
@given(st.lists(pairs, max_size=8), views, st.sampled_from(BYS))
def test_filters_and_groups_lose_nothing(found: list[Pair], view: ComparisonView, by: Any) -> None:
    """Each filter alone splits the rows; groups hold every row once; whatever the data, figures can be drawn."""
    kept, unknown = known_view(view, found)
    assert all(set(getattr(kept, name)) <= set(options(found)[name]) for name in FILTERS)
    assert len(unknown) == sum(len(getattr(view, n)) - len(getattr(kept, n)) for n in FILTERS) + (
        view.point != kept.point
    )
    shown = chosen(found, kept)
    assert all(p.kind in kept.kinds for p in shown) or not kept.kinds
    for name in FILTERS:
        alone = [chosen(found, ComparisonView(**{name: (value,)})) for value in options(found)[name]]
        assert sum(map(len, alone)) == len(found)
    info, errors = comparison_info(shown), errors_info(shown, by)
    assert sum(map(len, info.groups.values())) == sum(group.count for group in errors.groups) == len(shown)
    drawn = [len(trace.x) for trace in comparison_plot(info, point="x").data if trace.name != "equal"]
    assert sum(drawn) == len(shown) + sum(p.id == "x" for p in shown)
    assert len(errors_plot(errors).data) == len(FITS)
    assert len(errors_columns(errors)["fit"]) == len(errors.groups)


def test_errors_are_told_apart_by_what_was_fitted() -> None:
    held = [pair(id=str(n), predicted=10 + n, operator="gemm") for n in (0, 1, 4)]
    fitted = [pair(predicted=30.0, operator="gemm", fit="fitted"), pair(fit="not fitted", operator="moe")]
    info = comparison_info([*fitted, *held])
    assert info.held_out_median_absolute_error == {"ours": pytest.approx(0.1)}
    first, second, third = errors_info([*fitted, *held], "operator").groups
    assert (first.name, first.fit, first.count) == ("gemm", "held out", 3)
    assert (second.fit, second.median_absolute_error) == ("fitted", 2.0) and third.name == "moe"
    figure = comparison_plot(info)
    symbols = {trace.name: trace.marker.symbol for trace in figure.data}
    assert symbols["ours, committed, held out"] == "diamond" and symbols["ours, committed, fitted"] == "diamond-open"
    assert figure.layout.title.text == "median absolute error, held out: ours, committed 10% over 3 rows"
    assert comparison_plot(comparison_info(fitted)).layout.title.text == "no row was held out"


def test_names_are_text_in_figures() -> None:
    name = '<a href="//x">x</a>'
    odd = pair(id=name, operator=name, device=name, simulated=name)
    drawn = [*comparison_plot(comparison_info([odd])).data, *errors_plot(errors_info([odd], "operator")).data]
    words = str([(trace.customdata, trace.y if trace.type == "bar" else None, trace.name) for trace in drawn])
    assert "&lt;a href" in words
    assert words.count("<a href") == 1  # the id as a click gives it back, which nothing draws


def test_a_view_refuses_what_no_measurement_can_be() -> None:
    with pytest.raises(UserError, match="unknown kind 'x'; known: local, ours, published, upload"):
        ComparisonView(kinds=("x",))
    with pytest.raises(UserError, match="unknown by 'id'"):
        ComparisonView(by="id")  # type: ignore[arg-type]


# --- published rows


def test_published_rows_are_read_with_their_source() -> None:
    found = published()
    assert len(found.pairs) > 700 and sum(p.fit == "held out" for p in found.pairs) > 700
    assert sum(count for _, count in found.reasons) > 500 and found.problems == ()
    assert all(p.url and p.predicted_by and p.record for p in found.pairs)
    rate = next(p for p in found.pairs if p.unit == "TFLOPS")  # more is faster: its bound is a rate it cannot reach
    assert (rate.measured < rate.bound) and (rate.measured_seconds > rate.bound_seconds)  # type: ignore[operator]
    assert rate.low_seconds < rate.predicted_seconds < rate.high_seconds  # type: ignore[operator]
    assert [p.id for p in found.pairs if p.below_bound and p.exception is None] == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b"], "rows.csv must have the columns id, status"),
        ([",".join(COLUMNS), "A0162"], "other than"),
        ([",".join(COLUMNS), "nobody" + "," * (len(COLUMNS) - 1)], "rows that no table has"),
        ([",".join(COLUMNS), "A0162,predicted" + "," * (len(COLUMNS) - 2)], "measured of A0162 must be a positive"),
    ],
)
def test_a_broken_file_of_rows_is_one_line(lines: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        published(tmp_path / "rows.csv", FOLDER)
    with pytest.raises(UserError, match="this is none"):
        published(tmp_path / "none.csv")


def test_the_table_of_diffusion_models_names_every_family_and_source() -> None:
    info = models_info()
    assert {row.family for row in info.rows} == set(FAMILIES)
    assert all(row.source_url.startswith("https://") for row in info.rows)
    assert {"Mercury", "Gemini Diffusion", "DiffusionGemma"}.isdisjoint(info.without_speed)
    assert all((row.tokens_per_second is None) != (row.tokens_per_forward is None) for row in info.rows)
    columns = models_columns(
        dataclasses.replace(info, rows=(), without_speed=("TiDAR",), without_tokens_per_forward=("TiDAR",))
    )
    assert columns["model"] == ["none found"] and len({len(column) for column in columns.values()}) == 1


# --- our own and local records


def test_our_committed_measurements_stand_beside_predictions() -> None:
    """The held-out forwards as in validation.json, and fitted ones apart from them."""
    found = predicted_folders(our_files(), "ours", ROOT)
    assert found.problems == ()
    committed = json.loads((OURS / "validation.json").read_text())["rows"]
    shown = [p for p in found.pairs if p.source.endswith("forwards-held-out.jsonl")]
    assert [p.predicted for p in shown] == pytest.approx([row["predicted_seconds"] for row in committed])
    assert {p.fit for p in shown} == {"held out"}
    assert {p.fit for p in found.pairs if p.source.endswith("forwards-fit.jsonl")} == {"fitted"}
    assert {p.family for p in found.pairs} == {"our forward", "our operator", "our generation", "tuned step"}
    assert all(p.measured_by for p in found.pairs) and len({p.id for p in found.pairs}) == len(found.pairs)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder as a reader may have it: records with their profile and engine, and others with problems."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    for name in ("profile.yaml", "engine.yaml"):
        shutil.copy(OURS / name, folder / name)
    lines = (OURS / "forwards-fit.jsonl").read_text().splitlines()[:3]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "cut.jsonl").write_text(lines[0] + "\n" + lines[1][:50])
    (folder / "other.jsonl").write_text('{"step": 1}\n')
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    bare = tmp_path / "runs" / "bare"
    bare.mkdir()
    (bare / "records.jsonl").write_text(lines[0] + "\n")
    outside = tmp_path / "secret"
    outside.mkdir()
    (outside / "secret.jsonl").write_text(lines[0] + "\n")
    (tmp_path / "runs" / "link.jsonl").symlink_to(outside / "secret.jsonl")
    (tmp_path / "runs" / "folder").symlink_to(outside)
    (tmp_path / "demo-out").symlink_to(tmp_path / "runs" / "mine")
    return tmp_path


def test_local_records_are_found_and_a_broken_file_is_one_line(
    runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path / "home"))
    found = predicted_folders(local_files(runs), "local", runs)
    assert "secret" not in str(found)
    mine = [p for p in found.pairs if p.id.startswith("runs/mine/records:")]
    assert [p.fit for p in mine] == ["fitted"] * 3 and mine[0].kind == "local"
    assert "--hardware runs/mine/profile.yaml" in str(mine[0].predicted_by)
    assert len(found.problems) == 5  # cut and binary, in demo-out too, and no profile
    assert any("cut.jsonl line 2 is not valid JSON" in line for line in found.problems)
    assert any("cannot read runs/mine/binary.jsonl" in line for line in found.problems)
    (bare,) = [line for line in found.problems if "runs/bare" in line]
    assert "`ridgepoint hardware probe --out runs/bare/hardware.yaml`" in bare
    assert not any("\n" in line or str(tmp_path) in line for line in found.problems)


def test_a_file_that_has_changed_is_another_key(runs: Path) -> None:
    before = local_files(runs)
    (runs / "runs" / "mine" / "records.jsonl").write_text("")
    assert local_files(runs) != before and local_files(runs / "nowhere") == ()


# --- uploads


def record(**changes: Any) -> str:
    return json.dumps(json.loads((OURS / "forwards-fit.jsonl").read_text().splitlines()[0]) | changes)


def test_uploaded_records_are_predicted_on_the_device_they_name() -> None:
    device = load_profile(OURS / "profile.yaml")
    found = uploaded_records(record() + "\n" + record(model="/etc"), "mine.jsonl", device)
    assert [p.kind for p in found.pairs] == ["upload"] and found.pairs[0].fit == "not fitted"
    assert found.reasons == (("model '/etc' is not a known one", 1),)  # nothing is looked up by a path
    assert fits(device, {"device": "x", "cpu": "x", "cores": 2}) and not fits(device, {"device": "H100", "cpu": "x"})
    with pytest.raises(UserError, match="which h100-sxm is not"):
        uploaded_records(record(), "mine.jsonl", load_profile("h100-sxm"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, "1" * 5000, '{"kind": "forward"}', "\0", record(seconds=[-1])]
)
def test_an_upload_that_is_no_record_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"mine\.jsonl"):
        uploaded_records(text, "mine.jsonl", load_profile(OURS / "profile.yaml"))


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 10**12},
        {"context": -5},
        {"slots": -1},
        {"forward": "single"},
        {"kind": "generation", "tokens": [1] * 15, "forwards": 0},
        {"kernels": {}},
    ],
)
def test_an_impossible_record_has_a_reason_or_finite_numbers(changes: dict[str, Any]) -> None:
    found = uploaded_records(record(**changes), "mine.jsonl", load_profile(OURS / "profile.yaml"))
    assert len(found.pairs) + sum(count for _, count in found.reasons) == 1
    assert all(0 < p.predicted_seconds < 1e30 for p in found.pairs)


def test_an_uploaded_table_reads_no_file(tmp_path: Path) -> None:
    """A row may name a profile or a model by its path on the command line, but not in a file that somebody sent."""
    profile = tmp_path / "my.yaml"
    shutil.copy(OURS / "profile.yaml", profile)
    cells = [GEMM, GEMM | {"id": "p", "hardware": str(profile)}, SERVED | {"id": "m", "model_or_op": f"{tmp_path}/"}]
    lines = [",".join(GEMM), *(",".join(f'"{text}"' for text in row.values()) for row in cells)]
    rows = parse_rows(lines, "rows.csv")
    found = rows_of_file(predicted_rows(rows, paths=False), rows, "rows.csv")
    assert [p.id for p in found.pairs] == ["rows.csv:g"] and found.pairs[0].fit == "not fitted"
    assert found.pairs[0].predicted_by == "ridgepoint validate --rows rows.csv --json"
    reasons = " ".join(reason for reason, _ in found.reasons)
    assert "my.yaml' is not stated for certain" in reasons and "is not known" in reasons
    assert joined([found, found]).reasons[0][1] == 2


# --- the page


def page() -> None:
    from dashboards.views.measured import page

    page()


def texts(app: AppTest) -> str:
    assert not app.exception
    return "\n".join(element.value for kind in (app.markdown, app.caption, app.code) for element in kind)


def test_the_page_filters_and_shows_one_measurement_in_full(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setenv("RIDGEPOINT_HOME", str(runs / "home"))
    app = AppTest.from_function(page, default_timeout=60)
    app.query_params["kinds"] = ["published"]
    app.query_params["point"] = "A0162"
    app.run()
    assert app.multiselect(key="measured-kinds").value == ["published"]
    assert "253.7 TFLOPS" in texts(app)
    assert "ridgepoint validate --split series" in texts(app)
    assert len(app.error) == 5  # the broken files of this folder; the rest is there
    app.multiselect(key="measured-kinds").set_value(["local"])
    app.run()
    assert "3 measurements" in texts(app)
    assert app.query_params["kinds"] == "local" and app.query_params["point"] == ""
    app.multiselect(key="measured-fits").set_value(["held out"]).run()
    assert "No measurement passes all filters" in app.info[0].value


def test_each_section_is_drawn_alone_and_keeps_what_was_chosen_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = AppTest.from_function(page, default_timeout=60)
    app.query_params["section"], app.query_params["by"] = "errors", "device"
    app.run()
    assert len(app.get("plotly_chart")) == 1 and not app.dataframe
    app.segmented_control(key="measured-section").set_value("points").run()
    assert "measurements. Filled" in texts(app)
    app.selectbox(key="measured-point").set_value("A0162").run()
    app.segmented_control(key="measured-section").set_value("models").run()
    assert not app.get("plotly_chart") and len(app.dataframe[0].value) > 20
    app.segmented_control(key="measured-section").set_value("errors").run()
    assert app.segmented_control(key="measured-by").value == "device"
    assert (app.query_params["by"], app.query_params["point"]) == ("device", "A0162")


def test_an_address_names_what_no_measurement_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = AppTest.from_function(page, default_timeout=60)
    app.query_params["devices"] = ["h100-sxm", "`/etc/passwd`"]
    app.query_params["point"] = "/etc/passwd"
    app.run()
    assert not app.exception
    assert [error.value.count("passwd") for error in app.error] == [1, 1]
    assert app.multiselect(key="measured-devices").value == ["h100-sxm"]


def test_elsewhere_than_in_a_checkout_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dashboards.views.measured.published", lambda: published(tmp_path / "rows.csv"))
    monkeypatch.setattr("dashboards.views.measured.our_files", tuple)
    streamlit.cache_resource.clear()
    app = AppTest.from_function(page, default_timeout=60).run()
    assert not app.exception and not app.error
    assert "this is none" in app.caption[0].value
    assert "ridgepoint demo" in app.info[0].value


def test_one_measurement_in_words_says_what_its_seconds_are_of() -> None:
    words = described(pair(simulated="random weights", low=9.0, high=12.0))
    assert words["predicted"] == "11 unit (+10.0%)" and words["simulated"] == "random weights"
    assert words["80% interval"] == "9 to 12 unit" and words["time"].endswith("of") and "bound" not in words
