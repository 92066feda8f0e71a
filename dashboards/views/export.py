"""The fifth page: what each engine gets of what was tuned, what it cannot be told, and the files to download."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import streamlit as st

from autotune.export.policy import BY_HAND, Policy
from autotune.export.targets import TARGETS
from dashboards.asking import UnansweredError, ask
from dashboards.columns import columns_of, csv_text
from dashboards.exports import ExportInfo, command, download, export_info, pickable, policy_of
from dashboards.frame import escape, key, not_drawn, problem, remember, restore
from dashboards.source_menu import choose_source, unanswered
from dashboards.sources import TYPED, Source, known_sources, read_source, stamp
from hardware.files import UserError, known
from runtime.config import require

if TYPE_CHECKING:
    from autotune.results import StudyResult
    from autotune.tiling_results import TilingResult

T = TypeVar("T")

PAGE = "export"
_FRESH_SECONDS = 10.0  # for so long a database is not asked again
_MOST_LINES = 300  # of a file that are shown; the download has all
_OF_SOURCE = ("batch", "context", "study", "trial", "target")
_LANGUAGES = {".yaml": "yaml", ".json": "json"}


@dataclass(frozen=True)
class View:
    """What the page shows. study: one whose `trial` was picked by hand; "" for what all studies decided."""

    source: str = ""
    batch: int | None = None
    context: int | None = None
    study: str = ""
    trial: int | None = None
    target: str = "native"

    def __post_init__(self) -> None:
        for name in ("batch", "context"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} >= 1 must hold, but got {value}")
        require(self.trial is None or self.trial >= 0, f"trial >= 0 must hold, but got {self.trial}")
        if self.target not in TARGETS:
            raise known("export format", self.target, TARGETS)


@st.cache_data(show_spinner="Reading the study", max_entries=8, ttl=_FRESH_SECONDS)
def _read(source: Source, written: str) -> tuple[list[StudyResult], list[TilingResult]]:
    """By value: a file that was written to is another key."""
    return ask(source, "all", lambda: read_source(source))


def page() -> None:
    """The source, what of it and for which engine above; below, the files."""
    st.title("What each engine gets")
    restore(View, PAGE)
    source = choose_source(PAGE, known_sources(), _forget)
    if source is None:
        remember(View(TYPED), PAGE)
        not_drawn(View, PAGE, but=["source"])
        return
    drawn = ["source"]
    try:
        studies, tilings = _read(source, stamp(source))
        drawn += ["target", "study"]  # also where no setting of the study can be chosen
        view = _choice(studies)
    except UserError as error:
        # The reader's choice holds, though it cannot be shown: it may be there again soon.
        remember(View(source.name, *(st.session_state[key(PAGE, f)] for f in _OF_SOURCE)), PAGE)
        not_drawn(View, PAGE, but=drawn)
        if isinstance(error, UnansweredError):
            unanswered(PAGE, source, error)
        else:
            problem(error)
        return
    remember(view, PAGE)
    try:
        policies = {name: _policy(name, source, studies, tilings, view) for name in TARGETS}
    except UserError as error:
        problem(error)
        return
    found = {name: export_info(name, policy) for name, policy in policies.items()}
    _files(found[view.target])
    if not view.study and found[view.target].files:
        st.markdown("The same from the command line:")
        st.code(command(source, view.target, view.batch, view.context), language="bash", wrap_lines=True)
    st.subheader("All engines")
    _overview(list(found.values()))


# --- controls


def _forget() -> None:
    """Another source has other buckets and other settings."""
    for name in ("batch", "context"):
        st.session_state[key(PAGE, name)] = None
    st.session_state[key(PAGE, "study")] = ""
    _forget_trial()


def _forget_trial() -> None:
    st.session_state[key(PAGE, "trial")] = None


def _choice(studies: Sequence[StudyResult]) -> View:
    """What of the source, and for which engine."""
    first, second, third, fourth = st.columns([2, 2, 1, 1])
    with first:
        target = st.selectbox(
            "Export to",
            list(TARGETS),
            format_func=lambda name: f"{name} ({TARGETS[name].engine})",
            key=key(PAGE, "target"),
        )
    with second:
        menu = {"": "what was decided", **{s.name: f"one setting of {s.name}" for s in studies}}
        study = _select("study", "What", menu, on_change=_forget_trial)
    picked = next((s for s in studies if s.name == study), None)
    batch = context = trial = None
    if picked is not None:
        words = pickable(picked)
        require(bool(words), f"no setting of {study} has run and was right: there is none to export")
        trial = _select("trial", "Setting", words)
    else:
        with third:
            batch = _bucket("batch", "Batch", [s.subject.workload.batch for s in studies])
        with fourth:
            context = _bucket("context", "Context (tokens)", [s.subject.context for s in studies])
    return View(st.session_state[key(PAGE, "source")], batch, context, study, trial, target)


def _select(field: str, label: str, options: Mapping[T, str], on_change: Callable[[], None] | None = None) -> T:
    """A menu whose value may come from an address: one that is not there is named, and the first one is shown."""
    _check(field, list(options), next(iter(options)))
    chosen: T = st.selectbox(
        label, list(options), format_func=options.__getitem__, key=key(PAGE, field), on_change=on_change
    )
    return chosen


def _bucket(field: str, label: str, values: Sequence[int | None]) -> int | None:
    """A menu of what was tuned for; None is all of it."""
    there = sorted({value for value in values if value is not None})
    _check(field, [None, *there], None)
    chosen: int | None = st.selectbox(label, there, index=None, placeholder="all", key=key(PAGE, field))
    return chosen


def _check(field: str, options: Sequence[T], default: T) -> None:
    widget = key(PAGE, field)
    value = st.session_state.get(widget)
    if value not in options:
        if value is not None:
            problem(f"There is no {field} {value} here; it is left out.")
        st.session_state[widget] = default


# --- answers


def _policy(
    target: str, source: Source, studies: Sequence[StudyResult], tilings: Sequence[TilingResult], view: View
) -> Policy:
    return policy_of(
        source,
        studies,
        tilings,
        target,
        batch=view.batch,
        context=view.context,
        study=view.study,
        trial=view.trial,
    )


def _files(info: ExportInfo) -> None:
    """One target: how its files are loaded, what they cannot say, and the files, or why there are none."""
    st.subheader(escape(f"{info.target}: {info.engine}, {info.loads}"))
    st.markdown(escape(f"{info.file[0].upper()}{info.file[1:]}: {info.does}."))
    if info.refusal is not None:
        st.warning(escape(f"There is no file: {info.refusal}."))
        return
    if info.simulated:
        st.warning(escape(f"Simulated: {info.simulated}. The files say so too."))
    if info.picked:
        st.warning(escape(f"This setting was {BY_HAND}. The files say so too."))
    name, content, kind = download(info)
    st.download_button(
        f"Download {name}",
        content,
        file_name=name,
        mime=kind,
        key=key(PAGE, "download"),
        on_click="ignore",
        type="primary",
    )
    for title, lines in (
        ("How it is loaded", info.says),
        ("What the engine cannot be told of it", info.not_carried),
        ("What of the study is not in the files", info.left_out),
    ):
        if lines:
            st.markdown(f"**{title}**\n\n" + "\n".join(f"- {escape(line)}" for line in lines))
    for path, text in info.files:
        rows = text.splitlines()
        also = f" (the first {_MOST_LINES} of {len(rows):,} lines; the download has all)"
        st.markdown(f"**{escape(path)}**{escape(also) if len(rows) > _MOST_LINES else ''}")
        shown = "\n".join(rows[:_MOST_LINES])
        st.code(shown, language=_LANGUAGES.get(path[path.rfind(".") :]), height=_height(len(rows)))


def _height(lines: int) -> int | str:
    """In pixels: long files scroll in a box of their own."""
    return 400 if lines > 18 else "content"


def _overview(found: Sequence[ExportInfo]) -> None:
    """Every engine with this choice: the files, or what it cannot represent."""
    rows = [
        (i.target, i.engine, i.loads, str(len(i.files) or ""), i.refusal or "", "; ".join(i.not_carried)) for i in found
    ]
    columns = columns_of(("target", "engine", "loads", "files", "refused because", "not carried"), rows)
    st.table({name: [escape(cell) for cell in cells] for name, cells in columns.items() if any(cells)})
    st.download_button(
        "data (CSV)",
        csv_text(columns),
        file_name="export-targets.csv",
        mime="text/csv",
        key=key(PAGE, "targets"),
        on_click="ignore",
        type="tertiary",
    )
