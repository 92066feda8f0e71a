"""The second page: predictions beside measurements, published ones, ours, and those of the reader."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards.columns import columns_of
from dashboards.comparison import (
    BYS,
    FILTERS,
    KIND_WORDS,
    SECTIONS,
    ComparisonView,
    chosen,
    comparison_info,
    comparison_plot,
    described,
    errors_columns,
    errors_info,
    errors_plot,
    known_view,
    options,
    points_columns,
)
from dashboards.frame import escape, figure, key, not_drawn, problem, remember, restore, table, unfolded
from dashboards.pairs import NO_CHECKOUT, ROOT, ROWS, Pair, Pairs, joined, published, rows_of_file
from dashboards.published_models import models_columns, models_info
from dashboards.record_files import File, file_of, local_files, our_files
from dashboards.records import predicted_folders, uploaded_records
from hardware.files import UserError
from hardware.profile import list_profiles, load_profile
from perfmodel.published.evidence import FOLDER, TABLES, predicted_rows
from perfmodel.published.rows import parse_rows
from runtime.config import require

PAGE = "measured"
POINTS = "predicted-measured"  # the name of the figure whose points can be chosen
MOST_ROWS = 2000  # of an uploaded table: a second of predictions
LABELS = {
    "kinds": "Measurements",
    "families": "Operators",
    "devices": "Devices",
    "engines": "Engines",
    "sources": "Sources",
    "fits": "Fit",
}
HELP = {"fits": "what the numbers behind the prediction were fitted to: not to the row (held out), to it, or to none"}


# The files' times and sizes are the keys: what was written since is another key. What they return is never changed.
@st.cache_resource(show_spinner=False, max_entries=4)
def _published(files: tuple[File, ...]) -> Pairs:
    return published()


@st.cache_resource(show_spinner=False, max_entries=4)
def _ours(files: tuple[File, ...]) -> Pairs:
    return predicted_folders(files, "ours", ROOT)


@st.cache_resource(show_spinner=False, max_entries=8)
def _local(files: tuple[File, ...], start: str) -> Pairs:
    return predicted_folders(files, "local", Path(start))


@st.cache_resource(show_spinner="predicting the uploaded rows", max_entries=8)
def _uploaded(text: str, name: str, device: str) -> Pairs:
    if name.lower().endswith(".csv"):
        rows = parse_rows(io.StringIO(text, newline=""), name)
        require(len(rows) <= MOST_ROWS, f"{name} has {len(rows)} rows, but at most {MOST_ROWS} can be shown")
        return rows_of_file(predicted_rows(rows, paths=False), rows, name)
    return uploaded_records(text, name, load_profile(device))


def prepare() -> None:
    """Predict every row and record that ships."""
    _published(_tables())
    _ours(our_files())


def page() -> None:
    """Filters at the side; in the middle every point and the chosen one, or errors by group, or others' models."""
    st.title("How far off are predictions?")
    restore(ComparisonView, PAGE)
    found = _found()
    if not found.pairs:
        st.info(
            escape("No measurement here yet: `ridgepoint demo` or `ridgepoint bench --out runs/NAME.jsonl` makes some.")
        )
        _unread(found)
        return
    view = _controls(found.pairs)
    shown = chosen(found.pairs, view)
    drawn = [*FILTERS, "intervals", "section"]
    if view.section == "models":
        _models()
    elif not shown:
        st.info("No measurement passes all filters at the side: clear one of them.")
    elif view.section == "errors":
        view = _errors(shown, view)
        drawn.append("by")
    else:
        view = _points(shown, view)
        drawn.append("point")
    remember(view, PAGE)
    not_drawn(ComparisonView, PAGE, but=drawn)
    _unread(found)


def _found() -> Pairs:
    """Everything that can be shown; what cannot be read is a problem in it."""
    parts = []
    start = Path.cwd()
    try:
        parts.append(_published(_tables()))
    except UserError as error:
        if str(error) == NO_CHECKOUT:
            st.caption(NO_CHECKOUT)
        else:
            parts.append(Pairs(problems=(str(error),)))
    parts += [_ours(our_files()), _local(local_files(start), str(start)), *_upload()]
    return joined(parts)


def _tables() -> tuple[File, ...]:
    """The files of what is published, as they are now."""
    places = [ROWS, *(FOLDER / name for name in TABLES)]
    return tuple(file for path in places if (file := file_of(path)) is not None)


def _upload() -> list[Pairs]:
    with st.sidebar.expander("Add a file of measurements"):
        file = st.file_uploader(
            "Records of `ridgepoint bench` (.jsonl) or rows as in measurements/published (.csv)", ["jsonl", "csv"]
        )
        device = st.selectbox("Device of the records", sorted(list_profiles()), help="the rows of a .csv name theirs")
        if file is None:
            return []
        try:
            found = _uploaded(file.getvalue().decode("utf-8-sig"), _plain(file.name), device)
        except UnicodeDecodeError:
            problem(f"{_plain(file.name)} must be text in UTF-8")
            return []
        except UserError as error:
            problem(error)
            return []
        missing = sum(count for _, count in found.reasons)
        st.caption(f"{len(found.pairs)} rows predicted, {missing} not: the reasons stand below the figures")
        return [found]


def _plain(name: str) -> str:
    """A file's name as it can stand in a line."""
    return "".join(letter if letter.isprintable() else "?" for letter in Path(name).name)[-80:]


def _controls(pairs: tuple[Pair, ...]) -> ComparisonView:
    """The sidebar's filters. Names from the address that no measurement has are named and left out."""
    asked: dict[str, Any] = {name: tuple(st.session_state[key(PAGE, name)]) for name in FILTERS}
    view, unknown = known_view(ComparisonView(**asked, point=st.session_state[key(PAGE, "point")]), pairs)
    for line in unknown:
        problem(line)
    for name in FILTERS:
        st.session_state[key(PAGE, name)] = list(getattr(view, name))
    st.session_state[key(PAGE, "point")] = view.point
    allowed = options(pairs)
    filters: dict[str, Any] = {}
    with st.sidebar:
        for name in FILTERS:
            named: dict[Any, str] = KIND_WORDS if name == "kinds" else {}  # type: ignore[assignment]
            filters[name] = tuple(
                st.multiselect(
                    LABELS[name],
                    allowed[name],
                    key=key(PAGE, name),
                    format_func=lambda value, named=named: named.get(value, value),
                    placeholder="all",
                    help=HELP.get(name),
                )
            )
        intervals = st.checkbox("80% intervals", key=key(PAGE, "intervals"), help="where they are known")
    section = st.segmented_control(
        "What to show",
        SECTIONS,
        format_func=SECTIONS.__getitem__,
        key=key(PAGE, "section"),
        label_visibility="collapsed",
        required=True,
    )
    by = st.session_state[key(PAGE, "by")]
    return ComparisonView(**filters, intervals=intervals, by=by, point=view.point, section=section)


def _points(pairs: tuple[Pair, ...], view: ComparisonView) -> ComparisonView:
    """Every point, and the chosen one in full. Choosing one gives another view."""
    info = comparison_info(pairs)
    selected = figure(
        comparison_plot(info, intervals=view.intervals, point=view.point), POINTS, points_columns(pairs), select=True
    )
    simulated = f" {info.simulated_count} are simulated, and say so." if info.simulated_count else ""
    st.caption(
        f"{len(pairs)} measurements. Filled: held out of the fit behind the prediction; hollow: fitted to it; dotted: "
        f"no fit of its kind. Bars: the interval meant to hold 80% of such rows. Rates are shown as times.{simulated}"
    )
    ids = ["", *(pair.id for pair in pairs)]
    _take_selection(selected, ids)
    if st.session_state[key(PAGE, "point")] not in ids:
        st.session_state[key(PAGE, "point")] = ""
    point = st.selectbox(
        "One measurement in full: click a point, or choose it here",
        ids,
        key=key(PAGE, "point"),
        format_func=lambda name: name or "none",
    )
    pair = next((pair for pair in pairs if pair.id == point), None)
    if pair is not None:
        _one(pair)
    return replace(view, point=point)


def _take_selection(selected: list[dict[str, object]], ids: list[str]) -> None:
    """A click chooses its point once: what the menu below is set to afterwards counts."""
    names = [str(data[0]) for entry in selected if isinstance(data := entry.get("customdata"), list) and data]
    name = names[0] if names else ""
    taken = key(PAGE, "taken")
    if name and name != st.session_state.get(taken) and name in ids:
        st.session_state[key(PAGE, "point")] = name
        st.session_state[taken] = name
        st.rerun()  # the figure marks it
    st.session_state[taken] = name


def _one(pair: Pair) -> None:
    with st.container(key=key(PAGE, "one"), border=True):
        left, right = st.columns(2)
        with left:
            st.markdown("\n".join(f"- **{escape(name)}**: {escape(text)}" for name, text in described(pair).items()))
        with right:
            st.markdown("\n".join(f"- **{escape(name)}**: {escape(text)}" for name, text in pair.record))
            if pair.url is not None and pair.url.startswith(("https://", "http://")):
                st.link_button("its source", pair.url)
        # Drawn when it is opened: what shows code takes a browser a third of a second to load.
        with st.popover("The commands that repeat both"):
            for label, command in (("measured by", pair.measured_by), ("predicted by", pair.predicted_by)):
                if command is not None:
                    st.caption(label)
                    st.code(command, language=None, wrap_lines=True)


def _errors(pairs: tuple[Pair, ...], view: ComparisonView) -> ComparisonView:
    """Bars by group. Choosing another grouping gives another view."""
    by = st.segmented_control("by", BYS, key=key(PAGE, "by"), required=True)
    info = errors_info(pairs, by)
    figure(errors_plot(info), "errors", errors_columns(info))
    with unfolded("The same as a table, with bias and intervals", "errors-unfolded") as opened:
        if opened:
            table(errors_columns(info), "errors-table")
    return replace(view, by=by)


def _unread(found: Pairs) -> None:
    for line in found.problems:
        problem(line)
    if found.reasons:
        count = sum(number for _, number in found.reasons)
        with unfolded(f"{count:,} rows are not predicted", "not-predicted-unfolded") as opened:
            if opened:
                st.caption("A row is predicted only where it says all that a prediction needs; nothing is guessed.")
                table(columns_of(("reason", "rows"), found.reasons), "not-predicted")


def _models() -> None:
    """Published speeds of diffusion models."""
    try:
        info = models_info()
    except UserError as error:
        if str(error) != NO_CHECKOUT:
            problem(error)
        else:
            st.info("The table of published models is in a checkout of the repository.")
        return
    st.caption(
        "Published speeds of diffusion language models: figures of others, on the hardware and tasks they name. They "
        "are not comparable with one another, and none is predicted here. No tokens/s found for: "
        + (", ".join(info.without_speed) or "none")
        + ". No tokens per forward found for: "
        + (", ".join(info.without_tokens_per_forward) or "none")
        + "."
    )
    table(models_columns(info), "diffusion-models")
