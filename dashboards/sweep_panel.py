"""A search of this machine, started, watched and stopped from the page about tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import streamlit as st

from dashboards import sweeps
from dashboards.frame import escape, key, problem
from dashboards.source_menu import again_every
from dashboards.sources import TYPED, Source, known_sources, source_of
from hardware.files import UserError

_MINUTES = "With the probe of this machine, which takes half a minute or more of the first search here."
_DIVERGENCE = "The most tokens in which the chosen setting may differ from autoregressive decoding (--max-divergence)."
_ENDED = {"finished": "is finished", "stopped": "was stopped; what it measured is kept", "failed": "failed"}


def source_of_sweep(sweep: sweeps.Sweep) -> Source | None:
    """Where a search stores what it finds; it can be chosen before its file is there."""
    try:
        source = source_of(str(sweep.folder))
    except UserError:
        return None
    name = source.shown.removesuffix("/study.db") if source.name == TYPED else source.name
    return replace(source, name=name, label=name)


def wait_for(source: Source) -> None:
    """Until the first study of a search is there."""
    st.info("The search is starting. Its first setting is measured once the machine is probed and the model loaded.")

    def look(first: bool) -> None:
        sweep = sweeps.current()
        if not first and (sweep is None or sweep.state != "running" or source.name in known_sources()):
            st.rerun()

    again_every(1.0, look)


def sweep_panel(page: str, sweep: sweeps.Sweep | None, chosen: Callable[[Source], None]) -> None:
    """What can be searched, or how far the search is. chosen: called with where a search that was started stores."""
    st.subheader("Tune on this machine")
    if sweep is not None and sweep.state == "running":
        again_every(1.0, partial(_progress, page))
        return
    if sweep is not None:
        said = f"The last search {_ENDED[sweep.state]}" + (f": {sweep.message}" if sweep.state == "failed" else ".")
        (st.error if sweep.state == "failed" else st.info)(escape(said))
    st.fragment(_sweep_form)(page, chosen)  # what is chosen here changes nothing else on the page


def _sweep_form(page: str, chosen: Callable[[Source], None]) -> None:
    most = {name: f"{name}: up to {minutes:g} min" for name, minutes in sweeps.MOST_MINUTES.items()}
    longest = max(sweeps.MOST_MINUTES.values())
    request: dict[str, Any] = {
        "model": st.selectbox("Model", sweeps.models(), key=key(page, "model")),
        "batch": st.number_input("Batch (sequences)", 1, sweeps.MOST_BATCH, key=key(page, "batch")),
        "context": st.number_input(
            "Context (most cached tokens)", 1, value=None, placeholder="any", key=key(page, "context")
        ),
        "effort": st.selectbox("Effort", list(most), 1, key=key(page, "effort"), format_func=most.__getitem__),
        "minutes": st.number_input("Minutes", 0.1, longest, 1.0, 0.5, key=key(page, "minutes"), help=_MINUTES),
        "lossless": st.checkbox("Lossless settings only", True, key=key(page, "lossless")),
    }
    if not request["lossless"]:
        differing = st.number_input(
            "Tokens that may differ (%)", 0.0, 100.0, 1.0, 0.5, key=key(page, "divergence"), help=_DIVERGENCE
        )
        request["max_divergence"] = differing / 100
    request["replay"] = st.checkbox(
        "From the recording that ships", key=key(page, "replay"), help="measures nothing: its model, its batch"
    )
    if st.button("Start", type="primary", key=key(page, "start")):
        try:
            started = sweeps.start(sweeps.SweepRequest(**request))
        except UserError as error:
            problem(error)
            return
        ours = source_of_sweep(started)
        if ours is not None:
            chosen(ours)
        st.rerun()


def _progress(page: str, first: bool) -> None:
    """How far the search is, and the button that ends it."""
    sweep = sweeps.current()
    if sweep is None:
        return
    if not first and sweep.state != "running":
        st.rerun()
    share = min(1.0, sweep.elapsed_seconds / sweep.limit_seconds) if sweep.limit_seconds else 0.0
    left = max(0.0, (sweep.limit_seconds or 0.0) - sweep.elapsed_seconds)
    st.progress(share, escape(f"{sweep.done} settings of at most {sweep.planned}, {left:.0f} s left"))
    st.caption(escape(sweep.message))
    st.code(sweep.command, language="bash", wrap_lines=True)
    stopping = sweep.message == "stopping"
    if st.button("Stop", key=key(page, "stop"), disabled=stopping, help="What is measured is kept, and can go on."):
        sweeps.stop()
        st.rerun()
