"""The first page: does drafting pay at one operating point, on one device or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import streamlit as st

from dashboards.changes import (
    accepted_info,
    accepted_plot,
    change_info,
    change_plot,
    sensitivity_info,
    sensitivity_plot,
)
from dashboards.choice import (
    DENSE,
    DTYPES,
    GIVEN,
    SECTIONS,
    STORED,
    Answer,
    Choice,
    View,
    acceptances_of,
    answer,
    engines_of,
    explanation,
    pays_map,
    predict_command,
)
from dashboards.figures import (
    roofline_info,
    roofline_plot,
    speedup_info,
    speedup_plot,
    step_time_info,
    step_time_plot,
)
from dashboards.frame import escape, figure, key, not_drawn, problem, remember, restore, unfolded
from dashboards.maps import map_of, map_plot
from dashboards.words import acceptance_words, engine_words, loss_words, quantity, step_words, verdict
from hardware.files import UserError
from hardware.profile import HardwareProfile, list_profiles, load_profile
from perfmodel.acceptance import judged
from perfmodel.engine import load_engine
from perfmodel.known_acceptance import load_acceptance
from perfmodel.model_spec import known_models, load_spec
from perfmodel.prediction import Prediction
from runtime.config import SAMPLER_NAMES

PAGE = "explore"
MOST_EXPLAINED = 4  # devices at once: each takes a tenth of a second
SECTION_NAMES = dict(
    zip(SECTIONS, ("Speedup", "Break-even map", "Where the time goes", "What would change it"), strict=True)
)

# By value: a changed profile is another key.
_cached_answer = st.cache_data(answer, show_spinner=False, max_entries=512)
_cached_map = st.cache_data(pays_map, show_spinner=False, max_entries=128)
_cached_explanation = st.cache_data(explanation, show_spinner=False, max_entries=256)

Found = dict[str, tuple[HardwareProfile, Answer]]


def prepare() -> None:
    """Work out the default view, and read every file that any view needs."""
    view = View()
    engines_of(view.devices)
    acceptances_of(view.sampler)
    profiles = {name: load_profile(name) for name in view.devices}
    sweeps = {name: _cached_answer(view.choice.on(name), profile).speedups for name, profile in profiles.items()}
    speedup_plot(speedup_info({name: found for name, found in sweeps.items() if found}, "batch"))


def page() -> None:
    """Controls at the side, numbers and one section of figures in the middle; the address holds the view."""
    st.title("Does block-diffusion decoding pay here?")
    restore(View, PAGE)
    absent: list[str] = []
    try:
        choice = _controls(absent)
    except UserError as error:
        problem(error)
        return
    finally:
        not_drawn(View, PAGE, but=[field.name for field in dataclasses.fields(View) if field.name not in absent])
    found = _answers(choice)
    if found:
        _numbers(choice, found)
    view = _view(choice, found)
    remember(view, PAGE)
    if found:
        {"speedup": _speedups, "map": _map, "step": _steps, "changes": _changes}[view.section](view, found)


def _controls(absent: list[str]) -> Choice:
    """The sidebar's widgets. Those that the choice has no use for are left out, and named in `absent`."""

    def kept(name: str) -> Any:
        absent.append(name)
        return st.session_state[key(PAGE, name)]

    chosen, profiles = key(PAGE, "devices"), list_profiles()
    there = [name for name in st.session_state[chosen] if name in profiles]
    if len(there) < len(st.session_state[chosen]):  # a profile was deleted while it was shown, as `restore` has said
        st.session_state[chosen] = there or list(Choice.devices)
    with st.sidebar:
        devices = st.multiselect("Devices", sorted(profiles), key=chosen)
        model = st.selectbox("Model", known_models(), key=key(PAGE, "model"))
        engines = engines_of(devices, st.session_state[key(PAGE, "engine")])
        engine = st.selectbox(
            "Engine", engines, key=key(PAGE, "engine"), help="what runs the model; default: this project's"
        )
        dtype = st.selectbox(
            "Weights",
            DTYPES,
            key=key(PAGE, "dtype"),
            help="default: as published on a GPU, bfloat16 where that is not quantised; float32 on a CPU",
        )
        precision = _precision(model, kept)
        batch = st.number_input("Batch (sequences)", min_value=1, step=1, key=key(PAGE, "batch"))
        context = st.number_input(
            "Context (cached tokens per sequence)", min_value=1, step=256, key=key(PAGE, "context")
        )
        sampler = st.selectbox("Sampler", SAMPLER_NAMES, key=key(PAGE, "sampler"))
        drafting, denoising = sampler != "autoregressive", sampler == "denoising"
        draft_tokens = st.number_input(
            "Draft tokens K", min_value=1, step=1, key=key(PAGE, "draft_tokens"), disabled=not drafting
        )
        if sampler == "single_forward":
            levels = st.text_input(
                "Proposal levels",
                key=key(PAGE, "levels"),
                help=f"{DENSE}, or the acceptance counts to draft ahead for, from 0, with commas",
            )
        else:
            levels = kept("levels")
        if denoising:
            steps = st.number_input("Denoising steps per block", min_value=1, step=1, key=key(PAGE, "denoising_steps"))
            verify = st.checkbox("Verify the block", key=key(PAGE, "verify"))
        else:
            steps, verify = kept("denoising_steps"), kept("verify")
        judging = drafting and (verify or not denoising)
        acceptance = st.selectbox(
            "Acceptance of drafts",
            acceptances_of(sampler, st.session_state[key(PAGE, "acceptance")]),
            key=key(PAGE, "acceptance"),
            disabled=not judging,
            format_func=_acceptance_name,
            help="a length, or what was counted on a task: published or measured, as its name says",
        )
        length = st.number_input(
            "Acceptance length (tokens a step commits)",
            min_value=1.0,
            step=0.1,
            format="%.2f",
            key=key(PAGE, "acceptance_length"),
            disabled=not judging or acceptance != GIVEN,
        )
        weight = st.number_input(
            "Mixing weight w",
            min_value=0.0,
            max_value=1.0,
            step=0.1,
            key=key(PAGE, "mixing_weight"),
            disabled=not judging,
            help="share of the autoregressive logits; 1 is lossless. It changes acceptance, not the time of a step",
        )
        choice = Choice(
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
            acceptance=acceptance,
            mixing_weight=weight,
            **precision,
        )
        _accepted(choice)
    return choice


def _precision(model: str, kept: Callable[[str], Any]) -> dict[str, Any]:
    """What is stored narrower than the weights' type, and over how many devices of a node the model is divided."""
    experts = load_spec(model).num_experts > 0
    stored = {
        "weights": ("Linear layers and experts stored in", True, "beside bfloat16; default: as Weights says"),
        "expert_weights": ("Experts stored in", experts, "default: as the linear layers"),
        "activations": ("Activations in matmuls", True, "default: fp8 for fp8 weights, else as Weights says"),
        "cache_dtype": ("Keys and values stored in", True, "default: as Weights says"),
    }
    counts = {
        "tensor_parallel": ("Devices that share every layer", True),
        "expert_parallel": ("Devices that the experts are dealt out to", experts),
    }
    usual = all(st.session_state[key(PAGE, name)] == getattr(Choice, name) for name in (*stored, *counts))
    with unfolded("Precision and parallelism", key(PAGE, "precision"), at_first=not usual) as opened:
        if not opened:
            return {name: kept(name) for name in (*stored, *counts)}
        chosen: dict[str, Any] = {
            name: st.selectbox(label, STORED, key=key(PAGE, name), disabled=not able, help=words)
            for name, (label, able, words) in stored.items()
        }
        for name, (label, able) in counts.items():
            chosen[name] = st.number_input(label, min_value=1, step=1, key=key(PAGE, name), disabled=not able)
    return chosen


def _acceptance_name(name: str) -> str:
    return "a length" if name == GIVEN else f"{name} ({load_acceptance(name).kind})"


def _accepted(choice: Choice) -> None:
    """The histogram and the source of a known acceptance."""
    decoding = choice.decoding
    if not judged(decoding) or choice.acceptance == GIVEN:
        return
    counted = load_acceptance(choice.acceptance)
    info = accepted_info(
        counted.name, counted.histogram(decoding.sampler, choice.draft_tokens), choice.accepted.tokens(decoding)
    )
    st.caption(
        escape(
            f"{info.tokens_per_step:.2f} tokens a step. {counted.kind.capitalize()}: {counted.what}. "
            f"Source: {counted.source}. {acceptance_words(counted, decoding.sampler, choice.draft_tokens)}"
            + (" All of it is without mixing (w = 1)." if choice.mixing_weight != 1 else "")
        )
    )
    figure(accepted_plot(info), "acceptance", info.columns())


def _view(choice: Choice, found: Found) -> View:
    """The section that is shown, and whose map."""
    section = st.segmented_control(
        "What to show",
        SECTIONS,
        format_func=SECTION_NAMES.__getitem__,
        key=key(PAGE, "section"),
        label_visibility="collapsed",
    )
    device, able = st.session_state[key(PAGE, "map_device")], list(found) or list(choice.devices)
    if device not in able:  # none was chosen yet, or it is gone, or cannot run this
        device = st.session_state[key(PAGE, "map_device")] = able[0]
    if section == "map" and choice.decoding.drafts and found:
        device = st.selectbox("Device of the map", able, key=key(PAGE, "map_device"))
    return View(**dataclasses.asdict(choice), section=section or SECTIONS[0], map_device=device)


def _answers(choice: Choice) -> Found:
    """The devices that can run the choice; for each other one, the reason is shown."""
    found: Found = {}
    for name in choice.devices:
        try:
            profile = load_profile(name)
            found[name] = profile, _cached_answer(choice.on(name), profile)
        except UserError as error:
            problem(error)
    return found


def _numbers(choice: Choice, found: Found) -> None:
    st.caption("Predicted by the performance model; joules and dollars are estimates from TDP and price per hour.")
    for name, (_, answered) in found.items():
        st.subheader(escape(name))
        with st.container(key=f"numbers-{name}"):
            for row in _metrics(answered.chosen, answered.autoregressive):
                for column, (label, value) in zip(st.columns(len(row)), row.items(), strict=True):
                    column.metric(label, value)
        st.markdown(escape(f"{verdict(answered.chosen)} {step_words(answered.chosen)}"))
    for engine in dict.fromkeys(answered.chosen.engine for _, answered in found.values()):
        if said := engine_words(load_engine(engine)):
            st.caption(escape(said))
    loss = loss_words(choice.decoding)
    if loss:
        st.info(escape(loss))
    # Drawn when it is opened: what colours code takes a browser half a second to load.
    with st.popover("The same from the shell"):
        st.code("\n".join(predict_command(choice, name) for name in found), language="bash", wrap_lines=True)


def _metrics(chosen: Prediction, single: Prediction) -> tuple[dict[str, str], dict[str, str]]:
    joules, dollars = chosen.joules_per_million_tokens, chosen.dollars_per_million_tokens
    first = {
        "speedup": f"{chosen.speedup_over_autoregressive:.2f}x",
        f"{chosen.decoding.sampler} tokens/s": f"{chosen.tokens_per_second:,.0f}",
        "autoregressive tokens/s": f"{single.tokens_per_second:,.0f}",
        "time per token, one sequence": quantity(chosen.step_seconds / chosen.acceptance_length, "s"),
    }
    return first, {
        "most time goes to": chosen.bound,
        "experts per layer": f"{chosen.experts_per_layer:.1f}",
        "J per million tokens (estimate)": "not known" if joules is None else quantity(joules, "J"),
        "$ per million tokens (estimate)": "not known" if dollars is None else f"{dollars:.3g}",
    }


def _speedups(view: View, found: Found) -> None:
    for over in ("batch", "context"):
        sweeps = {
            name: found_sweep
            for name, (_, answered) in found.items()
            if (found_sweep := answered.speedups if over == "batch" else answered.by_context) is not None
        }
        if not sweeps:
            st.info("Autoregressive decoding is what speedups compare with: choose a sampler that drafts.")
            return
        info = speedup_info(sweeps, over)
        st.subheader(f"Speedup against {over}")
        figure(speedup_plot(info), f"speedup-{over}", info.columns())
        st.caption(escape(" ".join(f"{line.label}: {info.where_it_pays(line.label)}." for line in info.lines)))
        for label in info.left_out:
            st.info(escape(f"No {over} of {label} fits its memory."))


def _map(view: View, found: Found) -> None:
    if not view.decoding.drafts:
        st.info("Autoregressive decoding is what a map compares with: choose a sampler that drafts.")
        return
    choice, (profile, _) = view.choice, found[view.map_device]
    info = map_of(choice, profile.name, _cached_map(choice.on(profile.name), profile))
    st.subheader(escape(f"Where {info.setting} pays on {profile.name}"))
    figure(map_plot(info), "break-even", info.columns())
    st.markdown(escape(info.words))
    for headline in info.headlines:
        st.markdown(escape(headline.words))
    st.caption(
        "A headline is the tokens of a step that its publisher states as a speedup; what remains of it is those tokens "
        "over the cost of a step in autoregressive steps."
    )


def _steps(view: View, found: Found) -> None:
    predictions = [p for _, answered in found.values() for p in answered.predictions]
    st.subheader("Where a step's time goes")
    bars = step_time_info(predictions)
    figure(step_time_plot(bars), "step-time", bars.columns())
    st.subheader("Roofline")
    points = roofline_info([profile for profile, _ in found.values()], predictions)
    figure(roofline_plot(points), "roofline", points.columns())
    st.caption(
        "Large symbols are whole decoding steps, small ones their operators, at the estimated time; the lines are "
        "datasheet peaks, solid for main memory and dotted for caches. Every figure of a device has its source: "
        "`ridgepoint hardware show NAME`."
    )


def _changes(view: View, found: Found) -> None:
    shown = list(found.items())[:MOST_EXPLAINED]
    explained = {name: _cached_explanation(view.choice.on(name), profile) for name, (profile, _) in shown}
    changes, sensitivities = change_info(explained), sensitivity_info(explained)
    st.subheader("What a whole change does to tokens per second")
    if len(found) > len(shown):
        st.caption(f"Shown for the first {len(shown)} of the devices.")
    figure(change_plot(changes), "changes", changes.columns("gained"))
    for refused in changes.refused:
        st.caption(escape(refused))
    st.subheader("What one per cent more of it does")
    figure(sensitivity_plot(sensitivities), "sensitivities", sensitivities.columns("elasticity"))
    st.caption(
        "Each is changed alone and everything else kept; a bar to the left is a loss. 1% for 1% means that tokens per "
        "second follow it fully."
    )
