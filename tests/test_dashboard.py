"""The data of the figures, the words beside them, and the app that holds the pages."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dashboards.views
from dashboards.changes import (
    Effect,
    EffectsInfo,
    accepted_info,
    accepted_plot,
    change_plot,
    sensitivity_plot,
)
from dashboards.choice import BATCHES, Choice, answer, pays_map
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
from dashboards.maps import map_info, map_plot
from dashboards.words import (
    acceptance_words,
    break_even_length,
    forwards,
    loss_words,
    percent,
    quantity,
    rate,
    step_words,
    verdict,
)
from hardware.files import UserError
from hardware.profile import HardwareProfile, MemoryLevel, load_profile
from perfmodel.acceptance import judged
from perfmodel.breakeven import Axis
from perfmodel.decoding import predict
from perfmodel.known_acceptance import load_acceptance
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


@pytest.mark.parametrize("over", ["batch", "context"])
def test_the_speedup_line_says_what_predictions_say(over: Axis) -> None:
    found = answer(Choice(batch=48, context=3000), load_profile("h100-sxm"))
    sweep = {"batch": found.speedups, "context": found.by_context}[over]
    assert sweep is not None
    (line,) = speedup_info({"h100-sxm": sweep}, over).lines
    assert {"batch": 48, "context": 3000}[over] in line.at
    for value, speedup, tokens in zip(line.at, line.speedup, line.tokens_per_second, strict=True):
        predicted = step(load_profile("h100-sxm"), **{"batch": 48, "context": 3000, over: value})
        assert speedup == pytest.approx(predicted.speedup_over_autoregressive)
        assert tokens == pytest.approx(predicted.tokens_per_second)


def test_batches_that_do_not_fit_have_no_speedup() -> None:
    weights = 2 * load_spec("zaya1-8b").parameters
    small, tiny = one_level("small", (weights + 1e9) / MEMORY_SHARE), one_level("tiny", weights / 2)
    choice = Choice(context=1000)
    info = speedup_info({"small": answer(choice, small).speedups})  # type: ignore[dict-item]
    assert 1 in info.lines[0].at
    assert max(info.lines[0].at) < max(BATCHES)
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
    info = speedup_info({"x": answer(Choice(), load_profile("h100-sxm")).speedups})  # type: ignore[dict-item]
    (line,) = info.lines
    none = dataclasses.replace(info, lines=(dataclasses.replace(line, speedup=tuple(0.5 for _ in line.at)),))
    assert none.where_it_pays("x") == "it pays at no batch tried, 1 to 512"
    speedup = (1.5, 1.2, *(0.5 for _ in line.at[2:]))
    some = dataclasses.replace(info, lines=(dataclasses.replace(line, speedup=speedup),))
    assert some.where_it_pays("x") == "of the batches tried, 1 to 512, it pays at 1, 2"


def test_words_about_steps_and_losses() -> None:
    found = step(load_profile("h100-sxm"))
    assert found.step_seconds_interval is not None
    assert all(quantity(seconds, "s") in step_words(found) for seconds in found.step_seconds_interval)
    assert "not known" in step_words(dataclasses.replace(found, step_seconds_interval=None))
    assert loss_words(found.decoding) == ""
    assert "w = 0.5" in loss_words(DecodingConfig("two_forward", mixing_weight=0.5))
    assert "without a verification" in loss_words(DecodingConfig("denoising"))


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


def test_steps_that_coincide_are_both_seen() -> None:
    """Two devices with the same figures: the second one's symbols are smaller than the first one's behind them."""
    devices = [one_level("one"), one_level("two")]
    figure = roofline_plot(roofline_info(devices, [step(device) for device in devices]))
    sizes = [trace.marker.size for trace in figure.data if trace.mode == "markers" and trace.showlegend]
    assert len(sizes) == 2 and sizes[0] > sizes[1] > 10


FIGURES = ("roofline", "speedup", "speedup by context", "map", "changes", "sensitivities", "acceptance", "step time",
           "scatter", "front", "loss")  # fmt: skip
NAMED_BARS = {"step time", "changes", "sensitivities"}  # whose vertical axis holds names


@cache
def every_figure(name: str = "plain") -> dict[str, Any]:
    hardware = one_level(name)
    found = answer(Choice(), hardware)
    assert found.speedups is not None
    assert found.by_context is not None
    contexts = speedup_info({name: found.by_context}, "context")
    effects = EffectsInfo((Effect(name, f"more {name}", 0.5, 0.25),))
    trials = [FrontPoint(f"{name} {n}", 100.0 + n, n / 10, default=n == 0, chosen=n == 1) for n in range(3)]
    return {
        "roofline": roofline_plot(roofline_info([hardware], found.predictions)),
        "speedup": speedup_plot(speedup_info({name: found.speedups})),
        "speedup by context": speedup_plot(contexts),
        "map": map_plot(map_info(pays_map(Choice(), hardware), name, name, (1, 2048))),
        "changes": change_plot(effects),
        "sensitivities": sensitivity_plot(effects),
        "acceptance": accepted_plot(accepted_info(name, [1, 2, 1], 2.0)),
        "step time": step_time_plot(step_time_info(found.predictions)),
        "scatter": scatter_plot(scatter_info([row(1.0, 1.2), dataclasses.replace(row(1.0, 1.1), name=name)])),
        "front": front_plot(front_info([*trials, FrontPoint(name, None, None, feasible=False)])),
        "loss": loss_plot(loss_info([{"stage": name, "step": 1, "next_token": 2.0}])),
    }


@pytest.mark.parametrize("name", FIGURES)
def test_figures_name_their_axes_and_fit_both_themes(name: str) -> None:
    figure = every_figure()[name]
    assert figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text or name in NAMED_BARS
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert figure.layout.font.color is None
    assert any(len(trace.x) for trace in figure.data)
    if figure.layout.title.text:  # plotly's controls lie above the plot, at the right: a heading has a line of its own
        assert (figure.layout.title.yref, figure.layout.title.yanchor) == ("paper", "bottom")
        assert figure.layout.margin.t >= 60
    json.loads(figure.to_json())


@pytest.mark.parametrize("name", FIGURES)
def test_names_in_figures_stay_text(name: str) -> None:
    """Plotly obeys some HTML in labels, so nothing that comes from a file may bring its own."""
    texts = json.dumps(every_figure("<b>x")[name].to_plotly_json(), default=str)
    assert "<b>x" not in texts
    assert "&lt;b&gt;x" in texts


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
    ("name", "draft_tokens", "words"),
    [
        ("aime25-off", 16, "The length was counted at K = 16; the shares of steps are those of a distribution"),
        ("aime25-off", 10, "not counted at K = 10: it lies between those at 8 and 12; the shares"),
        ("zaya-nano-t1", 4, "The shares of steps follow from the rate of each position, which was counted."),
    ],
)
def test_what_is_derived_from_an_acceptance_is_not_said_to_be_counted(name: str, draft_tokens: int, words: str) -> None:
    assert words in acceptance_words(load_acceptance(name), "two_forward", draft_tokens)


def test_the_legend_of_step_times_is_below_the_axis_however_few_bars_there_are() -> None:
    alone = step(load_profile("h100-sxm"))
    for count in (1, 2, 8):
        layout = step_time_plot(step_time_info([alone] * count)).layout
        assert -layout.legend.y * (layout.height - layout.margin.t - layout.margin.b) >= 75  # its name takes 50 pixels


def test_every_page_is_in_the_menu() -> None:
    assert {module.name for module in pkgutil.iter_modules(dashboards.views.__path__)} == set(dashboards.views.TITLES)


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
