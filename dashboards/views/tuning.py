"""The third page: what a search tried and decided, live while it runs, and a search started and stopped from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import streamlit as st

from autotune.report import StudyReport, study_report
from autotune.results import StudyResult
from dashboards import sweeps
from dashboards.asking import UnansweredError, ask
from dashboards.frame import escape, figure, key, not_drawn, problem, remember, restore, table
from dashboards.source_menu import again_every, choose_source, unanswered
from dashboards.sources import TYPED, Source, known_sources, source_of
from dashboards.studies import StagesInfo, history_info, parallel_info, pareto_info, rank_info
from dashboards.study_figures import (
    Progress,
    history_plot,
    importance_plot,
    parallel_plot,
    pareto_plot,
    rank_plot,
    stages_plot,
)
from dashboards.study_tables import (
    Columns,
    failed_columns,
    front_columns,
    history_columns,
    importance_columns,
    parallel_columns,
    rank_columns,
    score_columns,
    source_columns,
    stage_columns,
    tiling_columns,
    trial_columns,
)
from dashboards.trials import decision_sentence
from dashboards.words import percent, quantity
from hardware.files import UserError, known

if TYPE_CHECKING:
    from autotune.watching import Contents, Watch

PAGE = "tuning"
PROGRESS = {"settings": "settings tried", "seconds": "time measuring"}
SECTIONS = {"result": "Result", "settings": "Settings", "predictions": "Predictions", "failures": "Failures"}
TILINGS = "tilings"  # the section of a storage that holds searches of tilings
_POLL_SECONDS = 3.0
_MINUTES = "With the probe of this machine, which takes half a minute or more of the first search here."
_DIVERGENCE = "The most tokens in which the chosen setting may differ from autoregressive decoding (--max-divergence)."
_NEXT = f"{PAGE}:next"  # in the session: the source of a search that was started
_ENDED = {"finished": "is finished", "stopped": "was stopped; what it measured is kept", "failed": "failed"}


@dataclass(frozen=True)
class View:
    """What is shown. source: a known one's name, or that something was typed, which a link cannot bring back."""

    source: str = ""
    study: str = ""
    section: str = "result"
    progress: str = "settings"

    def __post_init__(self) -> None:
        if self.section not in (*SECTIONS, TILINGS):
            raise known("section", self.section, (*SECTIONS, TILINGS))
        if self.progress not in PROGRESS:
            raise known("progress", self.progress, PROGRESS)


@st.cache_resource(max_entries=16, show_spinner=False)
def _watch(url: str) -> Watch:
    """What was read of a storage, for all readers."""
    from autotune.watching import Watch

    return Watch(url)


def page() -> None:
    """Choose a study, then see it; a search that runs is followed."""
    st.title("What did tuning find?")
    restore(View, PAGE)
    if _NEXT in st.session_state:
        st.session_state[key(PAGE, "source")] = st.session_state.pop(_NEXT)
        _forget()
    sweep = sweeps.current()
    with st.sidebar:
        _sweep_panel(sweep)
    offered = known_sources()
    ours = None if sweep is None else _source_of(sweep)
    if ours is not None:
        offered.setdefault(ours.name, ours)
    source = choose_source(PAGE, offered, _forget)
    if source is None:
        remember(View(TYPED), PAGE)
        not_drawn(View, PAGE, but=["source"])
        return
    try:
        watch = _watch(source.url)
        contents = ask(source, "contents", watch.contents)
    except UserError as error:
        remember(_wanted(source), PAGE)
        not_drawn(View, PAGE, but=["source"])
        if isinstance(error, UnansweredError):
            unanswered(PAGE, source, error)
        elif ours is None or sweep is None or source.name != ours.name:
            problem(error)
        elif sweep.state == "running":
            _wait_for(source)
        else:
            st.info("The last search stored nothing.")
        return
    view = _choose_study(contents)
    try:
        if view.section == TILINGS:
            _tilings(watch, source)
        else:
            _follow(watch, source, view, contents)
    except UnansweredError as error:
        unanswered(PAGE, source, error)
    except UserError as error:
        problem(error)


# --- what is looked at


def _wanted(source: Source) -> View:
    """What is asked of a source that cannot be read now: it may be there again soon."""
    study, section, progress = (st.session_state[key(PAGE, name)] for name in ("study", "section", "progress"))
    return View(source.name, study or "", section or "result", progress)


def _forget() -> None:
    """Another source has other studies."""
    st.session_state[key(PAGE, "study")] = ""


def _choose_study(contents: Contents) -> View:
    """One study of several, a part of what is to be seen of it, and what the search's progress is counted in."""
    widget = key(PAGE, "study")
    if st.session_state[widget] not in contents.studies:
        if st.session_state[widget]:
            problem(known("study of this storage", st.session_state[widget], contents.studies))
        st.session_state[widget] = contents.studies[0] if contents.studies else ""
    names = {**SECTIONS, TILINGS: "Tilings"} if contents.tilings else SECTIONS
    names = names if contents.studies else {TILINGS: "Tilings"}
    if st.session_state[key(PAGE, "section")] not in names:
        st.session_state[key(PAGE, "section")] = next(iter(names))
    places = st.columns([5, 7, 3])
    study = places[0].selectbox("Study: model, batch, context", contents.studies, key=widget) or ""
    section = places[1].segmented_control(
        "Show", list(names), key=key(PAGE, "section"), format_func=names.__getitem__
    ) or next(iter(names))
    progress = places[2].selectbox(
        "Progress by", list(PROGRESS), key=key(PAGE, "progress"), format_func=PROGRESS.__getitem__,
        disabled=section != "result",
    )  # fmt: skip
    view = View(st.session_state[key(PAGE, "source")], study, section, progress)
    remember(view, PAGE)
    return view


# --- what is shown of a study


def _follow(watch: Watch, source: Source, view: View, contents: Contents) -> None:
    """Draw a study; again and again while somebody tunes it."""

    def read() -> StudyResult:
        return watch.study(view.study)

    last = ask(source, ("study", view.study), read)
    if not watch.running(last):
        _study(last, view, live=False)
        return

    def draw(first: bool) -> None:
        nonlocal last
        found = contents
        try:
            if not first:
                last, found = ask(source, ("study", view.study), read), ask(source, "contents", watch.contents)
        except UnansweredError as error:  # the database is away for a while: what is known stays
            if error.again is not None:
                problem(error)
        except UserError as error:  # the file was deleted
            return problem(error)
        if not first and (found != contents or not watch.running(last)):
            st.rerun()  # the whole page: there is one study more, or it has ended
        _study(last, view, live=True)

    again_every(_POLL_SECONDS, draw)


def _study(result: StudyResult, view: View, *, live: bool) -> None:
    report = study_report(result)
    subject = result.subject
    work = subject.workload
    if live:
        st.info(f"Running: {report.evaluations} settings tried so far. This page follows it.", icon=":material/sync:")
    context = "any context" if subject.context is None else f"up to {subject.context} cached tokens"
    st.caption(
        escape(
            f"Measured: {subject.model} on {subject.device.get('device')}, batch {work.batch}, "
            f"{context}, {work.dtype}; "
            f"{report.evaluations} settings tried"
            + ("." if report.seconds is None else f" in {quantity(report.seconds, 's')} of measuring.")
        )
    )
    if report.simulated:
        st.warning(escape(f"Simulated: {report.simulated}."))
    if not report.evaluations:
        st.info("No setting has been measured yet.")
        return
    draw: dict[str, Callable[[StudyResult, StudyReport, View], None]] = {
        "result": _result,
        "settings": _settings,
        "predictions": _predictions,
        "failures": _failures,
    }
    draw[view.section](result, report, view)


def _figure(view: View, plot: go.Figure, name: str, columns: Columns) -> None:
    """A figure whose zoom stays while the same study grows."""
    plot.update_layout(uirevision=f"{view.source} {view.study} {view.progress}")
    figure(plot, name, columns)


def _result(result: StudyResult, report: StudyReport, view: View) -> None:
    decision = result.decision
    found = decision.comparison if decision else None
    if decision is not None and found is not None:
        ratio, interval, chosen, default, kept = st.columns([4, 5, 5, 4, 4])
        ratio.metric("against default", f"{found.ratio:.2f}x")
        interval.metric("95% interval", f"{found.low:.2f}–{found.high:.2f}")
        chosen.metric("fastest allowed, tokens/s", f"{found.tokens_per_second:,.0f}")
        default.metric("default, tokens/s", f"{found.default_tokens_per_second:,.0f}")
        kept.metric("to run", "the default" if decision.kept_default else f"trial {decision.trial}")
    st.markdown(escape(decision_sentence(result) if decision else "Nothing is decided yet."))
    st.subheader("Measured speed, and what differs from autoregressive decoding")
    front = pareto_info(result)
    _figure(view, pareto_plot(front), "tuning-front", front_columns(front))
    ended = report.evaluations - len(result.correct)
    st.caption(
        "Up is faster, left is closer to autoregressive decoding; nothing measured beats the line in both."
        + (f" {ended} settings that did not run through have no place here." if ended else "")
    )
    st.subheader("The search as it went")
    history = history_info(result, report)
    progress: Progress = "seconds" if view.progress == "seconds" else "settings"
    _figure(view, history_plot(history, progress), "tuning-history", history_columns(history))
    st.caption(
        "Settings that ended before they were measured lie on the line of zero; their reasons are under Failures."
    )


def _settings(result: StudyResult, report: StudyReport, view: View) -> None:
    st.subheader("Parameters, divergence and speed of what ran")
    parallel = parallel_info(result)
    if parallel.trials:
        _figure(view, parallel_plot(parallel), "tuning-parallel", parallel_columns(parallel))
        st.caption("A line is a setting, in the colour of its speed. A click on a group in the legend hides it.")
    st.subheader("What the fastest settings have in common")
    if report.importances:
        _figure(view, importance_plot(report.importances), "tuning-importances", importance_columns(report))
        st.caption(
            f"PED-ANOVA: what tells the fastest {percent(report.top_share or 0.0)} of the settings that ran from the "
            "others. The search chose them, so this is about these settings, not about the whole space."
        )
    else:
        st.info(escape(f"Not known: {report.importances_missing}."))
    st.subheader("All settings")
    table(trial_columns(result), "tuning-trials")


def _predictions(result: StudyResult, report: StudyReport, view: View) -> None:
    info = rank_info(result, report)
    rank, error, count = st.columns(3)
    rank.metric("Spearman's rank correlation", "-" if info.correlation is None else f"{info.correlation:.2f}")
    error.metric("median error", "-" if info.error is None else percent(info.error))
    count.metric("settings predicted before they ran", info.count)
    st.subheader("Predicted beside measured speed")
    _figure(view, rank_plot(info), "tuning-rank", rank_columns(info))
    st.caption(
        "The performance model predicted each setting before it was measured, with the acceptance that the pilots had "
        "shown. Hollow ones are the pilots and the default, whose counts it uses: the numbers above leave them out, "
        "the table does not."
    )
    st.subheader("Stage by stage")
    table(score_columns(report), "tuning-scores")
    st.subheader("Who proposed what")
    table(source_columns(report), "tuning-sources")
    st.caption("The performance model proposed seed and guided, the latter corrected by what was measured before.")


def _failures(result: StudyResult, report: StudyReport, view: View) -> None:
    info = StagesInfo(report.stages)
    st.subheader("Where trials ended")
    _figure(view, stages_plot(info), "tuning-stages", stage_columns(info))
    failed = failed_columns(result)
    st.subheader("Why settings did not run through")
    if failed["trial"]:
        table(failed, "tuning-failed")
    else:
        st.info("Every setting ran through all stages.")


def _tilings(watch: Watch, source: Source) -> None:
    found = ask(source, "tilings", watch.tilings)
    st.subheader("Tilings of kernels: what to run, beside the default")
    for what in sorted({r.subject.simulated for r in found if r.subject.simulated}):
        st.warning(escape(f"Simulated: {what}."))
    table(tiling_columns(found), "tuning-tilings")


# --- a search from here


def _source_of(sweep: sweeps.Sweep) -> Source | None:
    """Where a search stores what it finds; it can be chosen before its file is there."""
    try:
        source = source_of(str(sweep.folder))
    except UserError:
        return None
    name = source.shown.removesuffix("/study.db") if source.name == TYPED else source.name
    return replace(source, name=name, label=name)


def _wait_for(source: Source) -> None:
    """Until the first study of a search is there."""
    st.info("The search is starting. Its first setting is measured once the machine is probed and the model loaded.")

    def look(first: bool) -> None:
        sweep = sweeps.current()
        if not first and (sweep is None or sweep.state != "running" or source.name in known_sources()):
            st.rerun()

    again_every(1.0, look)


def _sweep_panel(sweep: sweeps.Sweep | None) -> None:
    st.subheader("Tune on this machine")
    if sweep is not None and sweep.state == "running":
        again_every(1.0, _progress)
        return
    if sweep is not None:
        said = f"The last search {_ENDED[sweep.state]}" + (f": {sweep.message}" if sweep.state == "failed" else ".")
        (st.error if sweep.state == "failed" else st.info)(escape(said))
    st.fragment(_sweep_form)()  # what is chosen here changes nothing else on the page


def _sweep_form() -> None:
    most = {name: f"{name}: up to {minutes:g} min" for name, minutes in sweeps.MOST_MINUTES.items()}
    longest = max(sweeps.MOST_MINUTES.values())
    request: dict[str, Any] = {
        "model": st.selectbox("Model", sweeps.models(), key=key(PAGE, "model")),
        "batch": st.number_input("Batch (sequences)", 1, sweeps.MOST_BATCH, key=key(PAGE, "batch")),
        "context": st.number_input(
            "Context (most cached tokens)", 1, value=None, placeholder="any", key=key(PAGE, "context")
        ),
        "effort": st.selectbox("Effort", list(most), 1, key=key(PAGE, "effort"), format_func=most.__getitem__),
        "minutes": st.number_input("Minutes", 0.1, longest, 1.0, 0.5, key=key(PAGE, "minutes"), help=_MINUTES),
        "lossless": st.checkbox("Lossless settings only", True, key=key(PAGE, "lossless")),
    }
    if not request["lossless"]:
        differing = st.number_input(
            "Tokens that may differ (%)", 0.0, 100.0, 1.0, 0.5, key=key(PAGE, "divergence"), help=_DIVERGENCE
        )
        request["max_divergence"] = differing / 100
    request["replay"] = st.checkbox(
        "From the recording that ships", key=key(PAGE, "replay"), help="measures nothing: its model, its batch"
    )
    if st.button("Start", type="primary", key=key(PAGE, "start")):
        try:
            started = sweeps.start(sweeps.SweepRequest(**request))
        except UserError as error:
            problem(error)
            return
        ours = _source_of(started)
        if ours is not None:
            st.session_state[_NEXT] = ours.name
        st.rerun()


def _progress(first: bool) -> None:
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
    if st.button("Stop", key=key(PAGE, "stop"), disabled=stopping, help="What is measured is kept, and can go on."):
        sweeps.stop()
        st.rerun()
