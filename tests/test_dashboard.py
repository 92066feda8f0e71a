"""The figures' data, the choice in an address, and the first page with every control."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from dashboards import app as app_module
from dashboards.address import from_query, to_query
from dashboards.choice import BATCHES, Choice, answer
from dashboards.evidence import (
    FrontPoint,
    front_info,
    front_plot,
    loss_info,
    loss_plot,
    scatter_info,
    scatter_plot,
)
from dashboards.figures import (
    roof,
    roofline_info,
    roofline_plot,
    speedup_info,
    speedup_plot,
    step_time_info,
    step_time_plot,
)
from dashboards.words import break_even_length, forwards, percent, quantity, rate, verdict
from hardware.files import UserError
from hardware.profile import HardwareProfile, MemoryLevel, load_profile, save_profile
from perfmodel.acceptance import judged
from perfmodel.decoding import predict
from perfmodel.memory import MEMORY_SHARE
from perfmodel.model_spec import load_spec
from perfmodel.prediction import Prediction
from perfmodel.validation import Row
from runtime.config import SAMPLER_NAMES, DecodingConfig, Workload

ROOT = Path(__file__).parents[1]
APP = ROOT / "dashboards" / "app.py"


def one_level(name: str = "plain", capacity_bytes: float = 100e9) -> HardwareProfile:
    """A GPU without caches: its roofline is exactly min(peak, intensity x bandwidth)."""
    return HardwareProfile(
        name=name,
        vendor="none",
        kind="gpu",
        compile_target="sm_90",
        compute_units=100,
        warp_size=32,
        shared_memory_bytes=None,
        peak_flops_per_second={"bfloat16": 500e12},
        achieved_flops_per_second={"bfloat16": 400e12},
        memory=(MemoryLevel("hbm", capacity_bytes, 2e12, 1.5e12),),
        launch_seconds=4e-6,
        graph_node_seconds=1e-6,
        sources={
            group: "derived: made up"
            for group in (
                "compute_units", "warp_size", "peak_flops_per_second", "achieved_flops_per_second", "memory",
                "launch_seconds", "graph_node_seconds",
            )
        },
    )  # fmt: skip


def step(hardware: HardwareProfile, sampler: str = "two_forward", batch: int = 1, context: int = 2048) -> Prediction:
    decoding = DecodingConfig(sampler=sampler, draft_tokens=16)  # type: ignore[arg-type]
    length = 6.8 if judged(decoding) else None
    workload = Workload(batch=batch, dtype="bfloat16")
    return predict(load_spec("zaya1-8b"), hardware, workload, decoding, context=context, acceptance_length=length)


@pytest.mark.parametrize("batch", [1, 8, 64, 512])
def test_points_lie_at_or_below_the_roof(batch: int) -> None:
    hardware = one_level()
    predictions = [step(hardware, sampler, batch, 512) for sampler in SAMPLER_NAMES]
    info = roofline_info([hardware], predictions)
    assert len(info.roofs) == 1
    assert len(info.points) == len(SAMPLER_NAMES)
    assert {p.sampler for p in info.operators} == set(SAMPLER_NAMES)
    for point in (*info.points, *info.operators):
        assert point.flops_per_second <= point.bound_flops_per_second * (1 + 1e-9), point
        assert point.bound_flops_per_second <= info.roofs[0].at(point.intensity) * (1 + 1e-9), point
    single, drafting, *_ = info.points
    assert drafting.intensity > single.intensity  # more slots share each weight


@pytest.mark.parametrize("name", ["h100-sxm", "mi300x"])
def test_memory_and_compute_meet_at_the_ridge(name: str) -> None:
    found = roof(load_profile(name), "bfloat16")
    assert found.levels[-1][0] == "hbm"
    assert found.at(found.ridge_point) == pytest.approx(found.peak_flops_per_second)
    assert found.at(found.ridge_point / 2) == pytest.approx(found.peak_flops_per_second / 2)
    assert found.at(found.ridge_point * 2) == found.peak_flops_per_second
    assert found.ridge_point == pytest.approx(step(load_profile(name)).ridge_point_flops_per_byte)


def test_a_roof_needs_a_peak_of_the_dtype() -> None:
    with pytest.raises(UserError, match="unknown dtype of plain 'float32'; known: bfloat16"):
        roof(one_level(), "float32")


def test_a_step_is_the_sum_of_its_segments() -> None:
    info = step_time_info([step(load_profile(name), batch=b) for name in ("h100-sxm", "mi300x") for b in (1, 64)])
    assert len(info.bars) == 4
    for bar in info.bars:
        assert sum(s.seconds for s in bar.segments) == pytest.approx(bar.seconds)
        assert bar.seconds_per_token == pytest.approx(bar.seconds / 6.8)
        assert {"experts", "attention", "lm_head", "sampler"} <= {s.operator for s in bar.segments}


def test_the_speedup_line_says_what_predictions_say() -> None:
    choice = Choice(devices=("h100-sxm",), batch=48)
    hardware = load_profile("h100-sxm")
    (line,) = speedup_info({"h100-sxm": answer(choice, hardware).speedups}).lines  # type: ignore[dict-item]
    assert line.batch == tuple(sorted({*BATCHES, 48}))
    for batch, speedup, tokens in zip(line.batch, line.speedup, line.tokens_per_second, strict=True):
        found = step(hardware, batch=batch)
        assert speedup == pytest.approx(found.speedup_over_autoregressive)
        assert tokens == pytest.approx(found.tokens_per_second)


def test_batches_that_do_not_fit_have_no_speedup() -> None:
    weights = 2 * load_spec("zaya1-8b").parameters
    small, tiny = one_level("small", (weights + 1e9) / MEMORY_SHARE), one_level("tiny", weights / 2)
    choice = Choice(context=1000)
    info = speedup_info({"small": answer(choice, small).speedups})  # type: ignore[dict-item]
    assert 1 in info.lines[0].batch
    assert max(info.lines[0].batch) < max(BATCHES)
    grown = dataclasses.replace(answer(choice, small).speedups, fits=answer(choice, small).speedups.fits & False)  # type: ignore
    assert speedup_info({"none": grown}).left_out == ("none",)
    with pytest.raises(UserError, match="weights and caches must fit"):
        answer(choice, tiny)


def test_words_about_batches_and_break_even() -> None:
    found = step(load_profile("h100-sxm"))
    assert found.speedup_over_autoregressive > 1
    assert "drafting pays: " in verdict(found)
    cost = break_even_length(found)
    at_cost = dataclasses.replace(found, acceptance_length=cost, speedup_over_autoregressive=1.0)
    assert "drafting does not pay: 1.00x" in verdict(at_cost)
    at = (load_spec("zaya1-8b"), load_profile("h100-sxm"), found.workload, found.decoding)
    again = predict(*at, context=2048, acceptance_length=cost)
    assert again.speedup_over_autoregressive == pytest.approx(1)
    line = speedup_info({"x": answer(Choice(), load_profile("h100-sxm")).speedups}).lines[0]  # type: ignore[dict-item]
    none = dataclasses.replace(line, speedup=tuple(0.5 for _ in line.batch))
    assert none.batches_that_pay == "it pays at no batch tried, 1 to 512"
    some = dataclasses.replace(line, speedup=(1.5, 1.2, *(0.5 for _ in line.batch[2:])))
    assert some.batches_that_pay == "of the batches tried, 1 to 512, it pays at 1, 2"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0124, "12.4 ms"),
        (989.4e12, "989 TFLOP/s"),
        (0.99999, "1 s"),
        (999.96e9, "1 TFLOP/s"),
        (0.0, "0 s"),
    ],
)
def test_quantities_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert quantity(value, text.split()[1].lstrip("mPT")) == text


def test_rates_and_shares() -> None:
    assert rate(12345.6) == "12,346 tokens/s"
    assert rate(12.34) == "12.3 tokens/s"
    assert percent(0.1234) == "12%"
    assert percent(0.0123) == "1.2%"


front_points = st.builds(
    FrontPoint,
    label=st.text(max_size=3),
    tokens_per_second=st.none() | st.integers(1, 6).map(float),
    divergence=st.none() | st.integers(0, 5).map(lambda n: n / 10),
    feasible=st.booleans(),
)


def dominates(a: FrontPoint, b: FrontPoint) -> bool:
    assert a.tokens_per_second is not None and b.tokens_per_second is not None
    assert a.divergence is not None and b.divergence is not None
    no_worse = a.tokens_per_second >= b.tokens_per_second and a.divergence <= b.divergence
    return no_worse and (a.tokens_per_second, a.divergence) != (b.tokens_per_second, b.divergence)


@settings(deadline=None, max_examples=100)
@given(st.lists(front_points, max_size=12))
def test_the_front_is_what_nothing_dominates(points: list[FrontPoint]) -> None:
    info = front_info(points)
    groups = (*info.front, *info.dominated, *info.infeasible)
    assert sorted(map(id, groups)) == sorted(map(id, points))
    usable = (*info.front, *info.dominated)
    assert all(p.feasible for p in usable)
    assert not any(dominates(a, b) for a in usable for b in info.front)
    assert all(any(dominates(a, b) for a in info.front) for b in info.dominated)
    divergences = [p.divergence or 0 for p in info.front]
    assert divergences == sorted(divergences)


def row(measured: float, predicted: float, fitted: bool = False, kind: Any = "forward") -> Row:
    return Row("point", kind, measured, predicted, measured / 10, fitted)


def test_equal_rows_lie_on_the_identity_line() -> None:
    info = scatter_info([row(t, t) for t in (0.001, 0.02, 0.5)])
    assert info.held_out_median_absolute_error == pytest.approx(0)
    figure = scatter_plot(info)
    identity, points = figure.data
    assert list(identity.x) == list(identity.y)
    assert list(points.x) == list(points.y)
    assert identity.x[0] < min(points.x) <= max(points.x) < identity.x[1]


def test_the_error_in_the_title_is_that_of_held_out_rows() -> None:
    rows = [row(1.0, 1.2), row(2.0, 1.6), row(3.0, 3.6, kind="generation"), row(1.0, 9.0, fitted=True)]
    info = scatter_info(rows)
    assert info.held_out_median_absolute_error == pytest.approx(0.2)
    assert info.held_out_count == 3
    assert {name: len(group) for name, group in info.groups.items()} == {
        "one forward, held out": 2, "mean step of a generation, held out": 1, "one forward, fitted to": 1,
    }  # fmt: skip
    assert scatter_plot(info).layout.title.text == "median absolute error 20% over 3 held-out points"
    assert scatter_plot(scatter_info(rows[-1:])).layout.title.text == "no row was held out"


def test_losses_continue_from_stage_to_stage() -> None:
    entries: list[dict[str, Any]] = [{"stage": "pretrain", "step": n, "next_token": 5 / n} for n in (10, 20, 30)]
    entries += [{"stage": "convert", "step": n, "next_token": 1.0, "mask": 2.0} for n in (10, 20)]
    info = loss_info(entries)
    assert info.stage_starts == {"pretrain": 0.0, "convert": 30.0}
    assert {line.label: line.step for line in info.lines} == {
        "next token (pretrain)": (10, 20, 30), "next token (convert)": (40, 50), "mask (convert)": (40, 50),
    }  # fmt: skip
    with pytest.raises(UserError, match="must have stage and step"):
        loss_info([{"loss": 3.0}])


def every_figure(name: str = "plain") -> dict[str, Any]:
    hardware = one_level(name)
    found = answer(Choice(), hardware)
    assert found.speedups is not None
    trials = [FrontPoint(f"{name} {n}", 100.0 + n, n / 10, default=n == 0, chosen=n == 1) for n in range(3)]
    return {
        "roofline": roofline_plot(roofline_info([hardware], found.predictions)),
        "speedup": speedup_plot(speedup_info({name: found.speedups})),
        "step time": step_time_plot(step_time_info(found.predictions)),
        "scatter": scatter_plot(scatter_info([row(1.0, 1.2), dataclasses.replace(row(1.0, 1.1), name=name)])),
        "front": front_plot(front_info([*trials, FrontPoint(name, None, None, feasible=False)])),
        "loss": loss_plot(loss_info([{"stage": name, "step": 1, "next_token": 2.0}])),
    }


@pytest.mark.parametrize("name", ["roofline", "speedup", "step time", "scatter", "front", "loss"])
def test_figures_name_their_axes_and_fit_both_themes(name: str) -> None:
    figure = every_figure()[name]
    assert figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text or name == "step time"  # whose bars are named
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert figure.layout.font.color is None
    assert any(len(trace.x) for trace in figure.data)
    json.loads(figure.to_json())


@pytest.mark.parametrize("name", ["roofline", "speedup", "step time", "scatter", "front", "loss"])
def test_names_in_figures_stay_text(name: str) -> None:
    """Plotly obeys some HTML in labels, so nothing that comes from a file may bring its own."""
    texts = json.dumps(every_figure("<b>x")[name].to_plotly_json(), default=str)
    assert "<b>x" not in texts
    assert "&lt;b&gt;x" in texts


choices = st.builds(
    Choice,
    devices=st.lists(st.sampled_from(["h100-sxm", "mi300x"]), min_size=1, max_size=2, unique=True).map(tuple),
    batch=st.integers(1, 10_000),
    context=st.integers(1, 100_000),
    sampler=st.sampled_from(SAMPLER_NAMES),
    draft_tokens=st.integers(7, 64),
    levels=st.sampled_from(["dense", "0", "0,4,7"]),
    denoising_steps=st.integers(1, 7),
    verify=st.booleans(),
    acceptance_length=st.floats(1, 8),
    dtype=st.sampled_from(["default", "bfloat16", "float32"]),
)


@settings(deadline=None, max_examples=50)
@given(choices)
def test_an_address_shows_the_choice_again(choice: Choice) -> None:
    assert from_query(Choice, to_query(choice)) == choice


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"batch": ["0"]}, "batch >= 1"),
        ({"batch": ["many"]}, "batch must be a int, but is 'many'"),
        ({"batch": ["1", "2"]}, "batch must be given once"),
        ({"context": ["0"]}, "context >= 1"),
        ({"context": ["200000"]}, "max_position_embeddings"),
        ({"draft_tokens": ["0"]}, "draft_tokens >= 1"),
        ({"acceptance_length": ["40"]}, "acceptance_length <= draft_tokens"),
        ({"acceptance_length": ["nan"]}, "acceptance_length <= draft_tokens"),
        ({"acceptance_length": ["inf"], "sampler": ["autoregressive"]}, "must be a number >= 1"),
        ({"sampler": ["magic"]}, "unknown sampler 'magic'; known: "),
        ({"sampler": ["single_forward"], "levels": ["1,2"]}, "must ascend from 0"),
        ({"sampler": ["single_forward"], "levels": ["all"]}, "levels must be dense or numbers"),
        ({"sampler": ["single_forward"], "levels": ["<b>"]}, "levels must be dense or numbers"),
        ({"sampler": ["denoising"], "denoising_steps": ["17"]}, "denoising_steps <= draft_tokens = 16"),
        ({"denoising_steps": ["0"]}, "denoising_steps >= 1"),
        ({"verify": ["yes"]}, "verify must be a bool, but is 'yes'"),
        ({"dtype": ["int3"]}, "unknown dtype 'int3'; known: "),
        ({"model": ["gpt"]}, "unknown model 'gpt'; known: "),
        ({"devices": ["abacus"]}, "unknown hardware 'abacus'; known: "),
        ({"devices": ["../profile.yaml"]}, "unknown hardware"),
        ({"devices": []}, "at least one device"),
        ({"colour": ["red"]}, "unknown parameter of the address 'colour'; known: "),
    ],
)
def test_an_impossible_address_is_refused(
    query: dict[str, list[str]], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(message)):
        from_query(Choice, query)


def test_levels_that_no_sampler_reads_are_kept_and_stop_nothing() -> None:
    """Half-typed levels must not lock the page once another sampler is chosen: their field is disabled then."""
    kept = from_query(Choice, {"sampler": ["two_forward"], "levels": ["0,"]})
    assert kept.levels == "0," and kept.decoding == DecodingConfig("two_forward")


def test_an_address_reads_no_file(tmp_path: Path) -> None:
    path = save_profile(one_level(), tmp_path / "plain.yaml")
    with pytest.raises(UserError, match="unknown hardware"):
        from_query(Choice, {"devices": [str(path)]})
    (tmp_path / "config.json").write_text('{"model_type": "zaya"}')
    with pytest.raises(UserError, match="unknown model"):
        from_query(Choice, {"model": [str(tmp_path)]})


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppTest]:
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path))
    yield AppTest.from_file(str(APP), default_timeout=30)


def metrics(page: AppTest) -> dict[str, str]:
    """The first device's numbers."""
    return {m.label: m.value for m in reversed(page.metric)}


def shown(page: AppTest) -> list[str]:
    assert not page.exception, page.exception
    return [e.value for e in page.error]


def test_the_page_shows_the_models_numbers(page: AppTest) -> None:
    page.run()
    assert shown(page) == []
    found = step(load_profile("h100-sxm"))
    single = step(load_profile("h100-sxm"), "autoregressive")
    assert metrics(page) == {
        "speedup": f"{found.speedup_over_autoregressive:.2f}x",
        "two_forward tokens/s": f"{found.tokens_per_second:,.0f}",
        "autoregressive tokens/s": f"{single.tokens_per_second:,.0f}",
        "most time goes to": found.bound,
        "experts per layer": f"{found.experts_per_layer:.1f}",
    }
    assert [s.value for s in page.subheader][:2] == ["h100\\-sxm", "mi300x"]
    assert len(page.get("plotly_chart")) == 3
    assert "it breaks even at" in page.markdown[0].value


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("multiselect", "devices", ["mi300x"]),
        ("number_input", "batch", 64),
        ("number_input", "context", 16_384),
        ("selectbox", "sampler", "autoregressive"),
        ("number_input", "draft_tokens", 8),
        ("number_input", "acceptance_length", 2.5),
        ("selectbox", "dtype", "float16"),
        ("selectbox", "sampler", "single_forward"),
        ("selectbox", "sampler", "denoising"),
    ],
)
def test_each_control_changes_the_answer_and_the_address(page: AppTest, kind: str, key: str, value: Any) -> None:
    page.query_params["batch"] = "32"
    page.run()
    before = metrics(page)
    getattr(page, kind)(key=f"explore-{key}").set_value(value).run()
    assert shown(page) == []
    choice = from_query(
        Choice, {"batch": ["32"], key: [str(v) for v in (value if isinstance(value, list) else [value])]}
    )
    found = answer(choice, load_profile(choice.devices[0])).chosen
    after = metrics(page)
    assert after["speedup"] == f"{found.speedup_over_autoregressive:.2f}x"
    assert after[f"{choice.sampler} tokens/s"] == f"{found.tokens_per_second:,.0f}"
    assert after != before or key == "dtype"  # float16 costs what bfloat16 does
    assert page.query_params[key] == to_query(choice)[key][-1]
    assert len(page.get("plotly_chart")) == (2 if choice.sampler == "autoregressive" else 3)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice(), "two forwards of 17 slots"),
        (Choice(sampler="single_forward", levels="0,4"), "one forward of 51 slots"),
        (Choice(sampler="denoising"), "one forward of 32 slots"),
        (Choice(sampler="denoising", denoising_steps=4), "one forward of 32 slots and 3 forwards of 16 slots"),
        (Choice(sampler="denoising", denoising_steps=4, verify=True), "5 forwards of 17 slots"),
    ],
)
def test_the_forwards_of_a_step_in_words(choice: Choice, words: str) -> None:
    assert forwards(answer(choice, load_profile("h100-sxm")).chosen) == words


@pytest.mark.parametrize(
    ("sampler", "kind", "key", "value"),
    [
        ("single_forward", "text_input", "levels", "0, 4, 7"),
        ("denoising", "number_input", "denoising_steps", 4),
        ("denoising", "checkbox", "verify", True),
    ],
)
def test_a_samplers_own_controls(page: AppTest, sampler: str, kind: str, key: str, value: Any) -> None:
    """They change its answer, and are off for every other sampler."""
    page.query_params["sampler"] = sampler
    page.query_params["batch"] = "64"  # where slots cost time
    page.run()
    before = metrics(page)
    getattr(page, kind)(key=f"explore-{key}").set_value(value).run()
    assert shown(page) == []
    choice = from_query(Choice, {"sampler": [sampler], "batch": ["64"], key: [str(value).replace(" ", "")]})
    found = answer(choice, load_profile(choice.devices[0])).chosen
    assert metrics(page)[f"{sampler} tokens/s"] == f"{found.tokens_per_second:,.0f}" != before[f"{sampler} tokens/s"]
    assert page.query_params[key] == to_query(choice)[key][-1]
    assert page.number_input(key="explore-acceptance_length").disabled == (sampler == "denoising" and key != "verify")
    page.selectbox(key="explore-sampler").set_value("two_forward").run()
    assert getattr(page, kind)(key=f"explore-{key}").disabled


def test_the_engine_can_be_changed(page: AppTest) -> None:
    """To one that runs on a device of the kind that is chosen; the address holds it."""
    page.run()
    engine = page.selectbox(key="explore-engine")
    assert {"default", "ridgepoint-eager", "vllm", "zyphra-vllm"} <= set(engine.options)
    assert "ridgepoint-cpu" not in engine.options
    before = metrics(page)
    engine.set_value("zyphra-vllm").run()
    assert shown(page) == []
    found = answer(Choice(engine="zyphra-vllm"), load_profile("h100-sxm")).chosen
    assert metrics(page)["two_forward tokens/s"] == f"{found.tokens_per_second:,.0f}" != before["two_forward tokens/s"]
    assert page.query_params["engine"] == "zyphra-vllm"
    page.query_params["engine"] = "ridgepoint-cpu"
    page.run()
    assert len(shown(page)) == 2 and all("runs on a cpu" in error for error in shown(page))
    page.query_params["engine"] = "warp"
    page.run()
    assert "unknown engine" in shown(page)[0]


def test_the_model_can_be_changed(page: AppTest) -> None:
    page.query_params["context"] = "512"
    page.run()
    other = next(
        name for name in page.selectbox(key="explore-model").options if name != "zaya1-8b"
    )  # a checkpoint that ships
    page.selectbox(key="explore-model").set_value(other).run()
    assert shown(page) == []
    found = answer(Choice(model=other, context=512), load_profile("h100-sxm")).chosen
    assert metrics(page)["two_forward tokens/s"] == f"{found.tokens_per_second:,.0f}"
    assert page.query_params["model"] == other


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("multiselect", "devices", [], "at least one device must be chosen"),
        ("number_input", "context", 131_072, "max\\_position\\_embeddings"),
        ("number_input", "acceptance_length", 17.5, "acceptance\\_length"),
        ("number_input", "batch", 1_000_000, "weights and caches must fit"),
    ],
)
def test_an_impossible_choice_is_one_line_and_mended_by_another(
    page: AppTest, kind: str, key: str, value: Any, message: str
) -> None:
    page.run()
    default = getattr(page, kind)(key=f"explore-{key}").value
    getattr(page, kind)(key=f"explore-{key}").set_value(value).run()
    errors = shown(page)
    assert errors
    assert all(message in e and "\n" not in e for e in errors)
    assert not page.metric
    getattr(page, kind)(key=f"explore-{key}").set_value(default).run()
    assert shown(page) == []
    assert page.metric


def test_an_address_is_followed_and_a_bad_one_named(page: AppTest) -> None:
    page.query_params["batch"] = "32"
    page.query_params["devices"] = ["mi300x"]
    page.run()
    assert shown(page) == []
    assert page.number_input(key="explore-batch").value == 32
    assert page.multiselect(key="explore-devices").value == ["mi300x"]
    page.query_params["batch"] = "[x](http://example.org)"  # another address in the same session
    page.run()
    (error,) = shown(page)
    assert error.startswith("The address cannot be shown")
    assert "](" not in error  # no link is made of it
    assert page.number_input(key="explore-batch").value == 1


def test_a_users_profile_is_offered_and_a_broken_one_is_one_line(page: AppTest, tmp_path: Path) -> None:
    save_profile(one_level("mine"), tmp_path / "hardware" / "mine.yaml")
    (tmp_path / "hardware" / "broken.yaml").write_text("name: broken\n")
    page.run()
    assert {"mine", "broken"} <= set(page.multiselect(key="explore-devices").options)
    page.multiselect(key="explore-devices").set_value(["broken", "mine"]).run()
    (error,) = shown(page)
    assert "missing key" in error
    assert metrics(page)["speedup"] == f"{step(one_level('mine')).speedup_over_autoregressive:.2f}x"
    faster = dataclasses.replace(one_level("mine"), launch_seconds=1e-9)
    save_profile(faster, tmp_path / "hardware" / "mine.yaml")  # the cache goes by value, not by name
    page.run()
    assert metrics(page)["two_forward tokens/s"] == f"{step(faster).tokens_per_second:,.0f}"


def test_pages_are_found_and_ordered() -> None:
    found = app_module.pages()
    assert found[0].TITLE == "Explore"
    assert len({m.ORDER for m in found}) == len(found)


def test_the_page_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from streamlit.testing.v1 import AppTest\n"
        f"page = AppTest.from_file({str(APP)!r}, default_timeout=60).run()\n"
        "assert not page.exception and len(page.metric) == 10, page.exception\n"
        "print(sorted({'torch', 'triton', 'transformers', 'optuna'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_taken_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, str(ROOT / "ridgepoint.py"), "dashboard", "--headless", "--port", str(port)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in run.stderr


def test_infinite_is_not_a_number_of_tokens() -> None:
    with pytest.raises(UserError):
        Choice(acceptance_length=math.inf)
