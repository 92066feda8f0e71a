"""The third page: what a search tried and decided, live while it runs, and a search started and stopped from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import streamlit as st

from autotune.report import StudyReport, study_report
from autotune.results import StudyResult
from dashboards import sweeps
from dashboards.asking import UnansweredError, ask
from dashboards.frame import escape, figure, key, not_drawn, problem, remember, restore, short_table, table, unfolded
from dashboards.source_menu import again_every, choose_source, unanswered
from dashboards.sources import TYPED, Source, known_sources
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
from dashboards.sweep_panel import source_of_sweep, sweep_panel, wait_for
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
_NEXT = f"{PAGE}:next"  # in the session: the source of a search that was started


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
        sweep_panel(PAGE, sweep, _choose_next)
    offered = known_sources()
    ours = None if sweep is None else source_of_sweep(sweep)
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
            wait_for(source)
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


def _choose_next(source: Source) -> None:
    st.session_state[_NEXT] = source.name


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
    with unfolded(f"All {len(result.measured):,} settings", key(PAGE, "all")) as opened:
        if opened:
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
    short_table(score_columns(report), "tuning-scores")
    st.subheader("Who proposed what")
    short_table(source_columns(report), "tuning-sources")
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
