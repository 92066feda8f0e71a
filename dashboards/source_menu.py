"""The menu of study storages on the pages about tuning and export, and what somebody typed and opened there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import streamlit as st

from dashboards.frame import escape, key, problem
from dashboards.sources import ENVIRONMENT, TYPED, Source, source_of
from hardware.files import UserError

# In the session, for both pages: what was opened, which no address can bring back; and what was chosen last.
_OPENED, _LAST = "opened-source", "last-source"


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
        if asked:  # not repeated: somebody may have written a database's URL into an address, with its password
            problem("a link names a study storage of this machine, but this one names another: the menu has those here")
        last = st.session_state.get(_LAST)
        st.session_state[widget] = last if last in names else names[0]
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
    if source.name == TYPED:
        st.session_state[_OPENED] = source
    st.session_state[key(page, "source")], st.session_state[key(page, "place")] = source.name, source.shown
    changed()
