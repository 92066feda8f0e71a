"""Explore: its state in the address, and the page with every control."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest
from typer.testing import CliRunner

import ridgepoint
from dashboards.address import from_query, to_query
from dashboards.choice import GIVEN, SECTIONS, STORED, Choice, View, acceptances_of, answer, predict_command
from dashboards.figures import roofline_info
from dashboards.words import quantity
from hardware.files import UserError, plain
from hardware.profile import load_profile, save_profile
from runtime.config import SAMPLER_NAMES, DecodingConfig
from tests.test_dashboard import APP, ROOT, one_level, step

views = st.builds(
    View,
    devices=st.just(("h100-sxm", "mi300x")),
    batch=st.integers(1, 10_000),
    context=st.integers(1, 100_000),
    sampler=st.sampled_from(SAMPLER_NAMES),
    draft_tokens=st.integers(7, 16),
    levels=st.sampled_from(["dense", "0", "0,4,7"]),
    denoising_steps=st.integers(1, 7),
    verify=st.booleans(),
    acceptance_length=st.floats(1, 8),
    dtype=st.sampled_from(["default", "bfloat16", "float32"]),
    acceptance=st.sampled_from([GIVEN, "zaya-nano-t1"]),
    mixing_weight=st.floats(0, 1),
    weights=st.sampled_from(STORED),
    tensor_parallel=st.integers(1, 8),
    section=st.sampled_from(SECTIONS),
    map_device=st.sampled_from(["", "h100-sxm", "mi300x"]),
)


@settings(deadline=None, max_examples=50)
@given(views)
def test_an_address_shows_the_view_again(view: View) -> None:
    assert from_query(View, to_query(view)) == view
    assert to_query(view.choice).items() <= to_query(view).items()


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
        ({"cache_dtype": ["int3"]}, "unknown dtype 'int3'; known: "),
        ({"tensor_parallel": ["0"]}, "tensor, expert >= 1"),
        ({"tensor_parallel": ["3"], "expert_parallel": ["2"]}, "must divide the other"),
        ({"model": ["gpt"]}, "unknown model 'gpt'; known: "),
        ({"devices": ["abacus"]}, "unknown hardware 'abacus'; known: "),
        ({"devices": ["../profile.yaml"]}, "unknown hardware"),
        ({"devices": []}, "at least one device"),
        ({"acceptance": ["guess"]}, "unknown acceptance 'guess'; known: "),
        ({"acceptance": ["aime26-on"]}, "unknown sampler of acceptance aime26-on 'two_forward'"),
        ({"acceptance": ["aime25-on"], "draft_tokens": ["2"]}, "with K = 4 to 32, but K is 2"),
        ({"mixing_weight": ["1.5"]}, "0 <= mixing_weight <= 1"),
        ({"mixing_weight": ["nan"], "sampler": ["autoregressive"]}, "0 <= mixing_weight <= 1"),
        ({"section": ["attic"]}, "unknown section 'attic'; known: "),
        ({"map_device": ["b200"]}, "unknown map_device 'b200'; known: h100-sxm, mi300x"),
        ({"colour": ["red"]}, "unknown parameter of the address 'colour'; known: "),
    ],
)
def test_an_impossible_address_is_refused(
    query: dict[str, list[str]], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(message)):
        from_query(View, query)


def test_levels_that_no_sampler_reads_are_kept_and_stop_nothing() -> None:
    """Half-typed levels must not lock the page once another sampler is chosen: their field is disabled then."""
    kept = from_query(View, {"sampler": ["two_forward"], "levels": ["0,"]})
    assert kept.levels == "0," and kept.decoding == DecodingConfig("two_forward")


def test_an_address_reads_no_file(tmp_path: Path) -> None:
    path = save_profile(one_level(), tmp_path / "plain.yaml")
    with pytest.raises(UserError, match="unknown hardware"):
        from_query(View, {"devices": [str(path)]})
    (tmp_path / "config.json").write_text('{"model_type": "zaya"}')
    with pytest.raises(UserError, match="unknown model"):
        from_query(View, {"model": [str(tmp_path)]})


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
    found, single = step(load_profile("h100-sxm")), step(load_profile("h100-sxm"), "autoregressive")
    assert found.joules_per_million_tokens is not None and found.dollars_per_million_tokens is not None
    assert metrics(page) == {
        "speedup": f"{found.speedup_over_autoregressive:.2f}x",
        "two_forward tokens/s": f"{found.tokens_per_second:,.0f}",
        "autoregressive tokens/s": f"{single.tokens_per_second:,.0f}",
        "time per token, one sequence": quantity(1 / found.tokens_per_second, "s"),
        "most time goes to": found.bound,
        "experts per layer": f"{found.experts_per_layer:.1f}",
        "J per million tokens (estimate)": quantity(found.joules_per_million_tokens, "J"),
        "$ per million tokens (estimate)": f"{found.dollars_per_million_tokens:.3g}",
    }
    assert [s.value for s in page.subheader][:2] == ["h100\\-sxm", "mi300x"]
    assert "it breaks even at" in page.markdown[0].value
    assert page.code[0].value.splitlines() == [predict_command(Choice(), name) for name in ("h100-sxm", "mi300x")]


def test_each_section_shows_its_figures(page: AppTest) -> None:
    """The map of the device that is chosen for it; a known acceptance with its histogram and where it comes from."""
    for section, figures in zip(SECTIONS, (2, 1, 2, 2), strict=True):
        page.query_params["section"] = section
        page.run()
        assert shown(page) == []
        assert len(page.get("plotly_chart")) == figures
    page.segmented_control(key="explore-section").set_value("map").run()
    assert "On h100\\-sxm, " in " ".join(m.value for m in page.markdown)
    page.selectbox(key="explore-map_device").set_value("mi300x").run()
    text = " ".join(m.value for m in page.markdown)
    assert "On mi300x, " in text
    assert "The headline 4.6x holds nowhere" in text and "The headline 7.7x holds nowhere" in text
    assert page.query_params["map_device"] == "mi300x"
    page.selectbox(key="explore-acceptance").set_value("aime25-on").run()
    assert len(page.get("plotly_chart")) == 2
    captions = [c.value.replace("\\", "") for c in page.caption]
    assert any("Published: ZAYA1" in text and "Source: " in text and "not counted" in text for text in captions)
    page.multiselect(key="explore-devices").set_value(["h100-sxm"]).run()  # the map's device is gone
    assert shown(page) == []
    assert page.query_params["map_device"] == "h100-sxm"
    page.multiselect(key="explore-devices").set_value(["l40s", "b200"]).run()
    page.number_input(key="explore-batch").set_value(1024).run()  # which the first of them has no memory for
    assert len(shown(page)) == 1
    assert "On b200, " in " ".join(m.value for m in page.markdown)
    page.number_input(key="explore-batch").set_value(1).run()
    page.selectbox(key="explore-sampler").set_value("autoregressive").run()
    assert shown(page) == []
    assert not page.get("plotly_chart") and "choose a sampler that drafts" in page.info[0].value


def drawn(page: AppTest, name: str) -> bool:
    kinds = (page.selectbox, page.number_input, page.text_input, page.checkbox)
    return any(widget.key == f"explore-{name}" for kind in kinds for widget in kind)


CONTROLS: list[tuple[str, str, Any]] = [
    ("number_input", "context", 16_384),
    ("number_input", "batch", 64),
    ("number_input", "draft_tokens", 8),
    ("number_input", "acceptance_length", 2.5),
    ("number_input", "mixing_weight", 0.5),
    ("selectbox", "weights", "fp8"),
    ("number_input", "tensor_parallel", 2),
    ("selectbox", "weights", "default"),
    ("selectbox", "dtype", "float16"),
    ("selectbox", "acceptance", "aime25-on"),
    ("selectbox", "engine", "zyphra-vllm"),
    ("multiselect", "devices", ["mi300x"]),
    ("selectbox", "acceptance", GIVEN),
    ("selectbox", "sampler", "single_forward"),
    ("text_input", "levels", "0, 4, 7"),
    ("selectbox", "sampler", "denoising"),
    ("number_input", "denoising_steps", 4),
    ("checkbox", "verify", True),
    ("selectbox", "sampler", "autoregressive"),
]


def test_each_control_changes_the_answer_and_the_address(page: AppTest) -> None:
    """One after the other, in one session. What a sampler does not use is off or not there, and kept."""
    page.query_params["section"] = "map"  # of one figure
    page.run()
    page.session_state["explore-precision"] = True  # unfolded
    page.run()
    choice = Choice()
    for kind, key, value in CONTROLS:
        before = metrics(page)
        getattr(page, kind)(key=f"explore-{key}").set_value(value).run()
        assert shown(page) == [], key
        wanted = tuple(value) if isinstance(value, list) else value.replace(" ", "") if key == "levels" else value
        choice = replace(choice, **{key: wanted})
        found = answer(choice, load_profile(choice.devices[0])).chosen
        after = metrics(page)
        assert after["speedup"] == f"{found.speedup_over_autoregressive:.2f}x", key
        assert after[f"{choice.sampler} tokens/s"] == f"{found.tokens_per_second:,.0f}"
        assert (after != before) == (key != "mixing_weight"), key  # which changes no time
        assert page.query_params[key] == to_query(choice)[key][-1]
        assert page.code[0].value.splitlines()[0] == predict_command(choice, choice.devices[0])
        assert [i.value[:12] for i in page.info if "lossless" in i.value] == ["Not lossless"] * (
            not choice.decoding.lossless
        )
        judging = choice.sampler in {"two_forward", "single_forward"} or choice.decoding.verify
        for name, owner in (("levels", "single_forward"), ("denoising_steps", "denoising"), ("verify", "denoising")):
            assert drawn(page, name) == (choice.sampler == owner)
        off = not judging or choice.acceptance != GIVEN
        assert page.number_input(key="explore-acceptance_length").disabled == off
        assert page.number_input(key="explore-mixing_weight").disabled == (not judging)


def test_what_is_folded_away_counts_and_is_shown_where_it_is_not_as_usual(page: AppTest) -> None:
    page.run()
    assert not drawn(page, "weights")
    page.session_state["explore-precision"] = True
    page.run()
    page.selectbox(key="explore-weights").set_value("fp8").run()
    narrow = metrics(page)["speedup"]
    page.session_state["explore-precision"] = False
    page.run()
    assert not drawn(page, "weights") and metrics(page)["speedup"] == narrow
    page.session_state["explore-precision"] = True
    page.run()
    assert page.selectbox(key="explore-weights").value == "fp8" == page.query_params["weights"]
    link = AppTest.from_file(str(APP), default_timeout=30)
    link.query_params["weights"] = "fp8"
    assert link.run().selectbox(key="explore-weights").value == "fp8" and metrics(link)["speedup"] == narrow
    link.selectbox(key="explore-weights").set_value("default").run()
    assert link.query_params["weights"] == "default" and drawn(link, "weights")  # nothing folds under one's hand


def test_engines_and_acceptances_are_those_that_fit(page: AppTest) -> None:
    page.run()
    engines = page.selectbox(key="explore-engine").options
    assert {"default", "ridgepoint-eager", "vllm", "zyphra-vllm"} <= set(engines)
    assert "ridgepoint-cpu" not in engines
    assert any("ridgepoint\\-graphs was fitted to no measured step" in caption.value for caption in page.caption)
    page.query_params["engine"] = "zyphra-vllm"
    page.run()
    assert not any("fitted to no measured step" in caption.value for caption in page.caption)
    assert "hmmt-on" in acceptances_of("single_forward") and "hmmt-on" not in acceptances_of("two_forward")
    assert "hmmt-on" in acceptances_of("two_forward", "hmmt-on")  # chosen already: the page says why it does not fit
    assert acceptances_of("denoising") == [GIVEN, "zaya-nano-t08", "zaya-nano-t1"]
    page.query_params["engine"] = "ridgepoint-cpu"
    page.run()
    assert len(shown(page)) == 2 and all("runs on a cpu" in error for error in shown(page))
    page.query_params["engine"] = "warp"
    page.run()
    assert "unknown engine" in shown(page)[0]


def test_the_model_can_be_changed(page: AppTest) -> None:
    page.query_params["context"] = "512"
    page.query_params["cache_dtype"] = "fp8"  # which unfolds what is not as usual
    page.run()
    other = next(
        name for name in page.selectbox(key="explore-model").options if name != "zaya1-8b"
    )  # a checkpoint that ships
    page.selectbox(key="explore-model").set_value(other).run()
    assert shown(page) == []
    assert page.selectbox(key="explore-expert_weights").disabled != Choice(model=other, context=512).has_experts
    found = answer(Choice(model=other, context=512, cache_dtype="fp8"), load_profile("h100-sxm")).chosen
    assert metrics(page)["two_forward tokens/s"] == f"{found.tokens_per_second:,.0f}"
    assert page.query_params["model"] == other


def test_an_impossible_choice_is_one_line_and_mended_by_another(page: AppTest) -> None:
    page.run()
    for kind, key, value, message in (
        ("multiselect", "devices", [], "at least one device must be chosen"),
        ("number_input", "context", 131_072, "max\\_position\\_embeddings"),
        ("number_input", "acceptance_length", 17.5, "acceptance\\_length"),
        ("number_input", "batch", 1_000_000, "weights and caches must fit"),
    ):
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
    faster = replace(one_level("mine"), launch_seconds=1e-9)
    save_profile(faster, tmp_path / "hardware" / "mine.yaml")  # the cache goes by value, not by name
    page.run()
    assert metrics(page)["two_forward tokens/s"] == f"{step(faster).tokens_per_second:,.0f}"
    for gone, left in (("broken", ["mine"]), ("mine", list(Choice.devices))):  # deleted while it is shown
        (tmp_path / "hardware" / f"{gone}.yaml").unlink()
        page.run()
        (error,) = shown(page)
        assert f"unknown hardware '{gone}'" in error and page.multiselect(key="explore-devices").value == left
        assert page.run().metric and shown(page) == []


def test_the_page_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from streamlit.testing.v1 import AppTest\n"
        f"page = AppTest.from_file({str(APP)!r}, default_timeout=60).run()\n"
        "assert not page.exception and len(page.metric) == 16, page.exception\n"
        "print(sorted({'torch', 'triton', 'transformers', 'optuna'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_step_with_narrow_weights_lies_above_its_roof() -> None:
    for device, chosen, dtype in (
        ("h100-sxm", {"weights": "fp8"}, "fp8"),
        ("h100-sxm", {"weights": "fp8", "activations": "bfloat16"}, "bfloat16"),  # widened: no fp8 arithmetic
        ("h100-sxm", {"weights": "int8", "activations": "int8"}, "int8"),
        ("h100-sxm", {"cache_dtype": "fp8"}, "bfloat16"),
        ("b200", {"weights": "mxfp4", "activations": "mxfp4"}, "fp4"),
    ):
        profile = load_profile(device)
        choice = Choice((device,), "llama-3.1-8b", batch=256, context=512, **chosen)  # type: ignore[arg-type]
        info = roofline_info([profile], answer(choice, profile).predictions)
        (above,) = info.roofs
        assert above.dtype == dtype
        assert all(p.flops_per_second <= above.peak_flops_per_second for p in (*info.points, *info.operators))


def test_infinite_is_not_a_number_of_tokens() -> None:
    with pytest.raises(UserError):
        Choice(acceptance_length=math.inf)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(devices=("h100-sxm",), batch=8, context=3000, acceptance_length=4.25),
        Choice(devices=("h100-sxm",), sampler="single_forward", levels="0,4,7", acceptance="aime25-on"),
        Choice(devices=("mi300x",), sampler="denoising", denoising_steps=4, verify=True, mixing_weight=0.5),
        Choice(devices=("mi300x",), sampler="denoising", denoising_steps=2, dtype="float16", engine="vllm"),
        Choice(devices=("h100-sxm",), sampler="autoregressive", mixing_weight=0.5),
        Choice(devices=("h100-sxm",), model="gpt-oss-20b"),  # published in mxfp4, and predicted so
        Choice(devices=("l40s",), model="zaya-nano", context=64, draft_tokens=8),
        Choice(devices=("b200",), expert_weights="mxfp4", cache_dtype="fp8", tensor_parallel=2, expert_parallel=4),
        Choice(devices=("h200",), model="llama-3.1-70b", weights="fp8", activations="bfloat16", tensor_parallel=2,
               sampler="autoregressive", expert_weights="mxfp4", expert_parallel=8),  # it has no experts
    ],
    ids=lambda choice: f"{choice.sampler} {choice.model} {choice.devices[0]}",
)  # fmt: skip
def test_the_command_gives_the_numbers_of_the_page(choice: Choice) -> None:
    (device,) = choice.devices
    words = shlex.split(predict_command(choice, device))
    assert words[0] == "ridgepoint"
    run = CliRunner().invoke(ridgepoint.app, [*words[1:], "--json"])
    assert run.exit_code == 0, run.output
    printed, found = json.loads(run.stdout), answer(choice, load_profile(device)).chosen
    assert printed["speedup_over_autoregressive"] == found.speedup_over_autoregressive
    assert printed["tokens_per_second"] == found.tokens_per_second
    assert printed["precision"] == found.precision and printed["parallel"] == plain(found.parallel)
