"""The menu of study storages on the pages about tuning and export, and what somebody typed and opened there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import streamlit as st

from dashboards.asking import UnansweredError, ask_again
from dashboards.frame import escape, key, problem
from dashboards.sources import ENVIRONMENT, TYPED, Source, source_of
from hardware.files import UserError

# In the session, for both pages: what was opened, which no address can bring back; and what was chosen last.
_OPENED, _LAST = "opened-source", "last-source"
_LOOK_SECONDS = 0.5  # from one look whether a database has answered to the next


def choose_source(page: str, offered: Mapping[str, Source], changed: Callable[[], None]) -> Source | None:
    """A source that is offered by name, or one that is typed and opened; None until there is one.

    changed: called when another one is chosen, before the page is drawn with it. The choice is in the page's widget
    "source", whose name is also what an address holds.
    """
    widget, names = key(page, "source"), [*offered, TYPED]
    asked, opened = st.session_state[widget], st.session_state.get(_OPENED)
    if not offered:
        st.info("No study here yet: `ridgepoint tune` makes one, and so does Start on the page about tuning.")
    if asked not in names:
        last = st.session_state.get(_LAST)
        if asked and asked == last:
            problem(f"{asked} is not there any more: another study storage is shown")
        elif asked:  # not repeated: somebody may have written a database's URL into an address, with its password
            problem("a link names a study storage of this machine, but this one names another: the menu has those here")
        st.session_state[widget] = last if last in names else names[0]
        if asked:
            changed()
    name = st.selectbox(
        "Study storage",
        names,
        key=widget,
        format_func=lambda n: offered[n].label if n in offered else "another place ...",
        help="studies that ship, those below runs/ and demo-out/ here, the user's own, and $RIDGEPOINT_STORAGE",
        on_change=changed,
    )
    st.session_state[_LAST] = name
    if name != TYPED:
        return offered[name]
    with st.form(key(page, "form"), border=False):
        place, secret, button = st.columns([5, 2, 1], vertical_alignment="bottom")
        place.text_input("Folder, SQLite file or postgresql://USER@HOST:PORT/DATABASE", key=key(page, "place"))
        secret.text_input("Password of the database", type="password", key=key(page, "password"), autocomplete="off")
        button.form_submit_button("Open", key=key(page, "open"), on_click=_open, args=(page, changed))
    if refused := st.session_state.pop(key(page, "refused"), None):
        problem(refused)
    elif opened is None:
        st.info(escape(f"A link never opens such a place: type it, or start the dashboard with it in {ENVIRONMENT}."))
    else:
        st.caption(escape(f"Opened: {opened.shown}"))
    return opened


def _open(page: str, changed: Callable[[], None]) -> None:
    """Take what was typed; its password stays in this session's source, and leaves the fields."""
    place, password = (st.session_state[key(page, name)] for name in ("place", "password"))
    st.session_state[key(page, "password")] = ""
    st.session_state.pop(_OPENED, None)
    try:
        source = source_of(place, password)
    except UserError as error:
        st.session_state[key(page, "refused")] = str(error)
        return
    ask_again(source)
    if source.name == TYPED:
        st.session_state[_OPENED] = source
    st.session_state[key(page, "source")], st.session_state[key(page, "place")] = source.name, source.shown
    changed()


def unanswered(page: str, source: Source, error: UnansweredError) -> None:
    """Say that a database is waited for, or away and when it is asked again; the page is drawn anew by itself then."""
    if error.again is None:
        st.info(escape(error), icon=":material/hourglass_empty:")
    else:
        problem(error)
        with st.container(horizontal=True, vertical_alignment="center"):
            st.button("Try again", key=key(page, "again"), on_click=ask_again, args=(source,))
            st.caption(f"It is asked again at {error.again:%H:%M:%S}, and then the page shows what it says.")

    def look(first: bool) -> None:
        if not first and error.due():
            st.rerun()

    again_every(_LOOK_SECONDS, look)


def again_every(seconds: float, draw: Callable[[bool], None]) -> None:
    """Draw now and then again, told whether it is the first time: only later ones may run the whole page anew.

    Else the browser would never get what this run of the page has put into its widgets.
    """
    first = [True]
    st.fragment(lambda: draw(bool(first and first.pop())), run_every=seconds)()
