"""The first page: does drafting pay at one operating point, on one device or several."""

from __future__ import annotations

import streamlit as st

from dashboards.choice import DENSE, DTYPES, Answer, Choice, answer, choice_from_query, engines_of
from dashboards.figures import (
    roofline_info,
    roofline_plot,
    speedup_info,
    speedup_plot,
    step_time_info,
    step_time_plot,
)
from dashboards.words import verdict
from hardware.files import UserError
from hardware.profile import HardwareProfile, list_profiles, load_profile
from perfmodel.model_spec import known_models
from runtime.config import SAMPLER_NAMES

TITLE = "Explore"
ORDER = 1

_cached_answer = st.cache_data(
    answer, show_spinner=False, max_entries=512
)  # by value: a changed profile is another key


def page() -> None:
    """Controls at the side, numbers and figures in the middle; the address holds the choice."""
    st.title("Does block-diffusion decoding pay here?")
    try:
        choice = _controls()
    except UserError as error:
        st.error(_escape(str(error)))
        return
    address = choice.query()
    st.session_state["address"] = address
    st.query_params.from_dict(address)
    profiles, answers = _answers(choice)
    if answers:
        _numbers(answers)
        _figures(profiles, answers)


def _controls() -> Choice:
    """The sidebar's widgets, filled from the address when it is not the one this page wrote itself."""
    asked = {key: st.query_params.get_all(key) for key in st.query_params}
    if "address" not in st.session_state or asked != st.session_state["address"]:
        try:
            choice = choice_from_query(asked)
        except UserError as error:
            st.error(_escape(f"The address cannot be shown: {error}"))
            choice = Choice()
        for key in choice.query():
            value = getattr(choice, key)
            st.session_state[key] = list(value) if isinstance(value, tuple) else value
    with st.sidebar:
        devices = st.multiselect("Devices", sorted(list_profiles()), key="devices")
        model = st.selectbox("Model", known_models(), key="model")
        batch = st.number_input("Batch (sequences)", min_value=1, step=1, key="batch")
        context = st.number_input("Context (cached tokens per sequence)", min_value=1, step=256, key="context")
        sampler = st.selectbox("Sampler", SAMPLER_NAMES, key="sampler")
        drafting, denoising = sampler != "autoregressive", sampler == "denoising"
        draft_tokens = st.number_input("Draft tokens K", min_value=1, step=1, key="draft_tokens", disabled=not drafting)
        levels = st.text_input(
            "Proposal levels",
            key="levels",
            disabled=sampler != "single_forward",
            help=f"{DENSE}, or the acceptance counts to draft ahead for, from 0, with commas",
        )
        steps = st.number_input(
            "Denoising steps per block", min_value=1, step=1, key="denoising_steps", disabled=not denoising
        )
        verify = st.checkbox("Verify the block", key="verify", disabled=not denoising)
        length = st.number_input(
            "Acceptance length (tokens a step commits)",
            min_value=1.0,
            step=0.1,
            format="%.2f",
            key="acceptance_length",
            disabled=not drafting or (denoising and not verify),
        )
        engines = engines_of(devices, st.session_state["engine"])
        engine = st.selectbox("Engine", engines, key="engine", help="what runs the model; default: this project's")
        dtype = st.selectbox("Weights", DTYPES, key="dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
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
            st.error(_escape(str(error)))
    return profiles, answers


def _numbers(answers: dict[str, Answer]) -> None:
    sweeps = {name: found.speedups for name, found in answers.items() if found.speedups is not None}
    ranges = {line.label: line.batches_that_pay for line in speedup_info(sweeps).lines}
    for name, found in answers.items():
        st.subheader(_escape(name))
        with st.container(key=f"numbers-{name}"):
            speedup, chosen, single, bound, experts = st.columns(5)
            speedup.metric("speedup", f"{found.chosen.speedup_over_autoregressive:.2f}x")
            chosen.metric(f"{found.chosen.decoding.sampler} tokens/s", f"{found.chosen.tokens_per_second:,.0f}")
            single.metric("autoregressive tokens/s", f"{found.autoregressive.tokens_per_second:,.0f}")
            bound.metric("most time goes to", found.chosen.bound)
            experts.metric("experts per layer", f"{found.chosen.experts_per_layer:.1f}")
        also = f" At this acceptance length, {ranges[name]}." if name in ranges else ""
        st.markdown(_escape(verdict(found.chosen) + also))


def _figures(profiles: list[HardwareProfile], answers: dict[str, Answer]) -> None:
    sweeps = {name: found.speedups for name, found in answers.items() if found.speedups is not None}
    predictions = [p for found in answers.values() for p in found.predictions]
    config = {"displaylogo": False}
    if sweeps:
        info = speedup_info(sweeps)
        st.subheader("Speedup against batch")
        st.plotly_chart(speedup_plot(info), key="speedup", config=config)
        for label in info.left_out:
            st.info(_escape(f"No batch of {label} fits its memory."))
    st.subheader("Where a step's time goes")
    st.plotly_chart(step_time_plot(step_time_info(predictions)), key="step-time", config=config)
    st.subheader("Roofline")
    st.plotly_chart(roofline_plot(roofline_info(profiles, predictions)), key="roofline", config=config)
    st.caption(
        "Large symbols are whole decoding steps, small ones their operators, at the estimated time; the lines are "
        "datasheet peaks, solid for main memory and dotted for caches. Every figure of a device has its source: "
        "`ridgepoint hardware show NAME`."
    )


def _escape(text: str) -> str:
    """Names come from files and addresses: no Markdown in them is obeyed."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-!|$~:" else c for c in text)
