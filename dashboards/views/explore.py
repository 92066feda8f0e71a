"""The first page: does drafting pay at one operating point, on one device or several."""

from __future__ import annotations

import dataclasses

import streamlit as st

from dashboards.choice import DENSE, DTYPES, Answer, Choice, answer, engines_of
from dashboards.figures import (
    RooflinePoint,
    SpeedupInfo,
    roofline_info,
    roofline_plot,
    speedup_info,
    speedup_plot,
    step_time_info,
    step_time_plot,
)
from dashboards.frame import columns_of, escape, figure, key, problem, remember, restore
from dashboards.words import verdict
from hardware.files import UserError
from hardware.profile import HardwareProfile, list_profiles, load_profile
from perfmodel.model_spec import known_models
from runtime.config import SAMPLER_NAMES

TITLE = "Explore"
ORDER = 1
PAGE = "explore"

_cached_answer = st.cache_data(
    answer, show_spinner=False, max_entries=512
)  # by value: a changed profile is another key


def page() -> None:
    """Controls at the side, numbers and figures in the middle; the address holds the choice."""
    st.title("Does block-diffusion decoding pay here?")
    try:
        choice = _controls()
    except UserError as error:
        problem(error)
        return
    remember(choice, PAGE)
    profiles, answers = _answers(choice)
    if answers:
        _numbers(answers)
        _figures(profiles, answers)


def _controls() -> Choice:
    """The sidebar's widgets."""
    restore(Choice, PAGE)
    with st.sidebar:
        devices = st.multiselect("Devices", sorted(list_profiles()), key=key(PAGE, "devices"))
        model = st.selectbox("Model", known_models(), key=key(PAGE, "model"))
        batch = st.number_input("Batch (sequences)", min_value=1, step=1, key=key(PAGE, "batch"))
        context = st.number_input(
            "Context (cached tokens per sequence)", min_value=1, step=256, key=key(PAGE, "context")
        )
        sampler = st.selectbox("Sampler", SAMPLER_NAMES, key=key(PAGE, "sampler"))
        drafting, denoising = sampler != "autoregressive", sampler == "denoising"
        draft_tokens = st.number_input(
            "Draft tokens K", min_value=1, step=1, key=key(PAGE, "draft_tokens"), disabled=not drafting
        )
        levels = st.text_input(
            "Proposal levels",
            key=key(PAGE, "levels"),
            disabled=sampler != "single_forward",
            help=f"{DENSE}, or the acceptance counts to draft ahead for, from 0, with commas",
        )
        steps = st.number_input(
            "Denoising steps per block", min_value=1, step=1, key=key(PAGE, "denoising_steps"), disabled=not denoising
        )
        verify = st.checkbox("Verify the block", key=key(PAGE, "verify"), disabled=not denoising)
        length = st.number_input(
            "Acceptance length (tokens a step commits)",
            min_value=1.0,
            step=0.1,
            format="%.2f",
            key=key(PAGE, "acceptance_length"),
            disabled=not drafting or (denoising and not verify),
        )
        engines = engines_of(devices, st.session_state[key(PAGE, "engine")])
        engine = st.selectbox(
            "Engine", engines, key=key(PAGE, "engine"), help="what runs the model; default: this project's"
        )
        dtype = st.selectbox(
            "Weights", DTYPES, key=key(PAGE, "dtype"), help="default: bfloat16 on a GPU, float32 on a CPU"
        )
    return Choice(
        devices=tuple(devices),
        model=model,
        batch=batch,
        context=context,
        sampler=sampler,
        draft_tokens=draft_tokens,
        levels=levels.replace(" ", ""),
        denoising_steps=steps,
        verify=verify,
        acceptance_length=length,
        dtype=dtype,
        engine=engine,
    )


def _answers(choice: Choice) -> tuple[list[HardwareProfile], dict[str, Answer]]:
    """The devices that can run the choice; for each other one, the reason is shown."""
    profiles: list[HardwareProfile] = []
    answers: dict[str, Answer] = {}
    for name in choice.devices:
        try:
            profile = load_profile(name)
            answers[name] = _cached_answer(choice, profile)
            profiles.append(profile)
        except UserError as error:
            problem(error)
    return profiles, answers


def _numbers(answers: dict[str, Answer]) -> None:
    sweeps = {name: found.speedups for name, found in answers.items() if found.speedups is not None}
    ranges = {line.label: line.batches_that_pay for line in speedup_info(sweeps).lines}
    for name, found in answers.items():
        st.subheader(escape(name))
        with st.container(key=f"numbers-{name}"):
            speedup, chosen, single, bound, experts = st.columns(5)
            speedup.metric("speedup", f"{found.chosen.speedup_over_autoregressive:.2f}x")
            chosen.metric(f"{found.chosen.decoding.sampler} tokens/s", f"{found.chosen.tokens_per_second:,.0f}")
            single.metric("autoregressive tokens/s", f"{found.autoregressive.tokens_per_second:,.0f}")
            bound.metric("most time goes to", found.chosen.bound)
            experts.metric("experts per layer", f"{found.chosen.experts_per_layer:.1f}")
        also = f" At this acceptance length, {ranges[name]}." if name in ranges else ""
        st.markdown(escape(verdict(found.chosen) + also))


def _figures(profiles: list[HardwareProfile], answers: dict[str, Answer]) -> None:
    sweeps = {name: found.speedups for name, found in answers.items() if found.speedups is not None}
    predictions = [p for found in answers.values() for p in found.predictions]
    if sweeps:
        info = speedup_info(sweeps)
        st.subheader("Speedup against batch")
        figure(speedup_plot(info), "speedup", _speedup_columns(info))
        for label in info.left_out:
            st.info(escape(f"No batch of {label} fits its memory."))
    st.subheader("Where a step's time goes")
    bars = step_time_info(predictions)
    segments = [(bar.label, s.operator, s.seconds, s.bound) for bar in bars.bars for s in bar.segments]
    figure(step_time_plot(bars), "step-time", columns_of(("step", "operator", "seconds", "bound"), segments))
    st.subheader("Roofline")
    points = roofline_info(profiles, predictions)
    names = [f.name for f in dataclasses.fields(RooflinePoint)]
    rows = [[getattr(p, name) for name in names] for p in (*points.points, *points.operators)]
    figure(roofline_plot(points), "roofline", columns_of(names, rows))
    st.caption(
        "Large symbols are whole decoding steps, small ones their operators, at the estimated time; the lines are "
        "datasheet peaks, solid for main memory and dotted for caches. Every figure of a device has its source: "
        "`ridgepoint hardware show NAME`."
    )


def _speedup_columns(info: SpeedupInfo) -> dict[str, list[object]]:
    rows = [
        (line.label, *values)
        for line in info.lines
        for values in zip(line.batch, line.speedup, line.tokens_per_second, strict=True)
    ]
    return columns_of(("hardware", "batch", "speedup_over_autoregressive", "tokens_per_second"), rows)
