"""The fourth page: devices side by side with the sources of their figures, and devices of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from dashboards.device_form import MOST_CACHES, Field, Group, groups, profile_of, source_key, values_of
from dashboards.devices import DTYPES, TABS, DevicesView, comparison_info, peaks_info, peaks_plot
from dashboards.frame import escape, figure, key, problem, remember, restore, table
from hardware.comparison import known_profiles, nearest
from hardware.files import UserError
from hardware.own import MOST_BYTES, forget_profile, keep_profile, own_profiles, parse_profile
from hardware.profile import HardwareProfile, list_profiles, user_folder

PAGE = "hardware"
SAID, UPLOADS, FORM = "hardware:said", "hardware:uploads", "hardware:form"  # kept between runs, not in the address
MOST_FAULTS = 20  # of a file, in lines

Profiles = Mapping[str, HardwareProfile]


@st.cache_resource(show_spinner=False, max_entries=4)  # by names and states of all files; a probed one takes 40 ms
def _read(files: tuple[tuple[object, ...], ...]) -> tuple[dict[str, HardwareProfile], list[str]]:
    return known_profiles()


def _files() -> tuple[tuple[object, ...], ...]:
    found: list[tuple[object, ...]] = []
    for path in list_profiles().values():
        try:
            state = path.stat()
        except OSError:  # deleted since it was listed, or a link to nothing
            found.append((str(path),))
        else:
            found.append((str(path), state.st_mtime_ns, state.st_size, state.st_ino))
    return tuple(found)


def page() -> None:
    """One of four parts; a profile that cannot be read is named, and the others work."""
    st.title("Devices")
    restore(DevicesView, PAGE)
    if SAID in st.session_state:
        st.success(escape(st.session_state.pop(SAID)))
    profiles, broken = _read(_files())
    for line in broken:
        problem(line)
    devices = key(PAGE, "devices")  # one may have been deleted, or broken, since
    st.session_state[devices] = [name for name in st.session_state[devices] if name in profiles]
    st.segmented_control(
        "Part", list(TABS), format_func=TABS.__getitem__, key=key(PAGE, "tab"), required=True,
        label_visibility="collapsed",
    )  # fmt: skip
    tab = st.session_state[key(PAGE, "tab")]
    {"compare": _compare, "file": _file, "form": _form, "own": _own}[tab](profiles)
    remember(_view(), PAGE)


def _view() -> DevicesView:
    state = st.session_state
    known = list_profiles()  # a device may have been deleted just now
    return DevicesView(
        devices=tuple(name for name in state[key(PAGE, "devices")] if name in known),
        tab=state[key(PAGE, "tab")],
        dtype=state[key(PAGE, "dtype")],
        differing=state[key(PAGE, "differing")],
    )


# --- devices side by side


def _compare(profiles: Profiles) -> None:
    left, right = st.columns([4, 1])
    devices = left.multiselect("Devices", sorted(profiles), key=key(PAGE, "devices"))
    dtype = right.selectbox("Rates of", DTYPES, key=key(PAGE, "dtype"))
    chosen = {name: profiles[name] for name in devices}
    if not chosen:
        st.info("Choose a device to see its figures, and several to compare them.")
        return
    st.subheader("Compute over bandwidth")
    info = peaks_info(chosen, dtype)
    if info.left_out:
        st.info(escape(f"Without a {dtype} rate: {', '.join(info.left_out)}."))
    if info.points:
        figure(peaks_plot(info), "hardware-peaks", info.columns())
    st.caption(
        "Large filled symbols are datasheet peaks (dense), small hollow ones what a large matmul and a read of main "
        "memory achieved. The ridge point is the peak rate over the peak bandwidth: work with fewer FLOPs per byte "
        "than that is bound by memory. The dotted lines join equal ridge points."
    )
    st.subheader("Figures")
    differing = st.toggle("Only what differs", key=key(PAGE, "differing"))
    compared = comparison_info(chosen)
    table(compared.shown(differing=differing), "hardware-figures", data=compared.columns())
    st.caption(
        "An empty cell: no such figure is known. The peaks of a profile that `ridgepoint hardware probe` wrote are the "
        "fastest samples. The data to download is in SI base units, each figure with its source."
    )
    st.subheader("Sources")
    table(compared.sourced(), "hardware-sources", links=("link",))
    st.subheader("Profiles")
    with st.container(horizontal=True):
        paths = list_profiles()
        for name in chosen:
            try:
                text = paths[name].read_bytes()
            except (OSError, KeyError):  # deleted since it was read
                continue
            st.download_button(
                escape(f"{name}.yaml"), text, f"{name}.yaml", "application/yaml", key=f"hardware-yaml-{name}",
                on_click="ignore",
            )  # fmt: skip


# --- a new device


def _file(profiles: Profiles) -> None:
    st.markdown(
        "A device is one YAML file with a source for every figure: the profiles on the first tab can be downloaded and "
        "changed. Nothing is written before it is checked, previewed and saved. Comments are not kept."
    )
    count = st.session_state.setdefault(UPLOADS, 0)  # another key empties the widget once its file is saved
    upload = st.file_uploader(
        f"Profile (YAML, at most {MOST_BYTES // 1024} KiB)",
        type=["yaml", "yml"],
        key=f"hardware-upload-{count}",
        max_upload_size=1,
    )
    if upload is None:
        return
    try:
        profile = parse_profile(upload.getvalue(), upload.name)
    except UserError as error:
        faults = error.each()
        for fault in faults[:MOST_FAULTS]:
            problem(fault)
        if len(faults) > MOST_FAULTS:
            problem(f"{upload.name}: {len(faults) - MOST_FAULTS} more faults")
        return
    _preview(profile, profiles)


def _form(profiles: Profiles) -> None:
    if not profiles:
        st.info("No profile can be read to start from.")
        return
    state = st.session_state
    names = sorted(profiles)
    first = next(iter(state[key(PAGE, "devices")]), names[0])
    form = state.setdefault(FORM, {"start": first, "caches": None, "values": {}, "checked": False})
    if form["start"] not in profiles:
        form |= {"start": first, "caches": None, "values": {}, "checked": False}
    left, right, _ = st.columns([2, 2, 1])
    state.setdefault("hardware-start", form["start"])
    start = left.selectbox("Start from", names, key="hardware-start")
    base = profiles[start]
    if start != form["start"] or form["caches"] is None:
        form |= {"start": start, "caches": min(MOST_CACHES, len(base.memory) - 1), "checked": False}
        form["values"] = values_of(base, form["caches"])
        _fill(form["values"])
        state["hardware-caches"] = form["caches"]
    state.setdefault("hardware-caches", form["caches"])
    caches = right.number_input("Caches above main memory", 0, MOST_CACHES, step=1, key="hardware-caches")
    if caches != form["caches"]:
        again = {k: v for k, v in values_of(base, caches).items() if k.startswith("memory.")}
        form["values"] |= again
        form |= {"caches": caches, "checked": False}
        _fill(again)
    _fill({k: v for k, v in form["values"].items() if _widget(k) not in state})  # after another part was shown
    st.markdown(
        "What is left as it is keeps its source; what is changed or new needs one. Empty: no such figure is known."
    )
    parts = groups(caches)
    wanted = [f.key for group in parts for f in group.fields] + [source_key(g) for g in parts if g.key]
    values = {k: state[_widget(k)] for k in wanted}  # as they were when the form was checked last
    form["values"] = form["values"] | values
    profile = None
    faults: dict[str, list[str]] = {}
    checked = form["checked"] or state.get("hardware-check", False)
    if checked:
        try:
            profile = profile_of(values, base, caches)
        except UserError as error:
            for fault in error.each():
                faults.setdefault(str(fault.place[0]) if fault.place else "", []).append(str(fault))
    if faults:
        problem(f"To be mended before this can be saved: {sum(map(len, faults.values()))}.")
        for line in faults.get("", []):
            problem(line)
    with st.form("hardware-fields", enter_to_submit=False):
        for group in parts:
            _group(group, faults)
        form["checked"] = st.form_submit_button("Check and preview", key="hardware-check") or form["checked"]
    if profile is not None:
        if base.measured and not profile.measured:
            st.info(escape(f"The curves that a probe measured are not taken over: figures of {start} were changed."))
        _preview(profile, profiles)


def _widget(field: str) -> str:
    """The key of a field's widget; keys are classes of the page, which bear no dots."""
    return "hardware-form-" + field.replace(".", "-")


def _fill(values: Mapping[str, Any]) -> None:
    for field, value in values.items():
        st.session_state[_widget(field)] = value


def _group(group: Group, faults: Mapping[str, list[str]]) -> None:
    st.markdown(f"**{group.title}**")
    wide = {"peaks": 6, "achieved": 6, "memory": 3, "link": 3}.get(group.key, 4)
    for start in range(0, len(group.fields), wide):
        for column, field in zip(st.columns(wide), group.fields[start : start + wide], strict=False):
            with column:
                _field(field)
                for line in faults.get(field.key, []):
                    problem(line)
    if group.key:
        source = source_key(group)
        st.text_input(
            "Source of what is changed or new",
            key=_widget(source),
            placeholder="source of what is changed or new: its address, or derived: how, or measured: by what and when",
            label_visibility="collapsed",
        )
        for line in faults.get(source, []):
            problem(line)


def _field(field: Field) -> None:
    widget = _widget(field.key)
    if field.kind == "choice":
        st.selectbox(field.label, ["gpu", "cpu"], key=widget)
    elif field.kind == "text":
        st.text_input(field.label, key=widget, max_chars=80)
    elif field.kind == "whole":
        st.number_input(field.label, value=None, step=1, key=widget)
    else:
        st.number_input(field.label, value=None, format="%.12g", key=widget)


def _preview(profile: HardwareProfile, profiles: Profiles) -> None:
    """A new device beside the nearest known one, and the button that saves it."""
    st.subheader(escape(f"Preview of {profile.name}"))
    other = nearest(profile, profiles.values())
    shown = {f"{profile.name} (new)": profile} | ({other.name: other} if other else {})
    if other:
        st.caption(escape(f"Beside {other.name}, the known device that is nearest to it."))
    info = comparison_info(shown)
    table(info.shown(), "hardware-preview", data=info.columns())
    if profile.measured:
        st.caption(f"With a probe's curves for {len(profile.measured)} thread counts.")
    replace = profile.name in own_profiles()
    if replace:
        agreed = st.checkbox(
            escape(f"Replace my {profile.name}, which is there already"), key=f"hardware-replace-{profile.name}"
        )
    elif profile.name in list_profiles():
        agreed = True
        st.info(
            escape(f"A bundled device is called {profile.name} too: it is left as it is, but yours is used instead.")
        )
    else:
        agreed = True
    if st.button("Save", key="hardware-save", type="primary", disabled=not agreed):
        try:
            path = keep_profile(profile, replace=replace)
        except UserError as error:
            problem(error)
            return
        st.session_state[UPLOADS] = st.session_state.get(UPLOADS, 0) + 1
        st.session_state.pop(FORM, None)
        st.session_state[SAID] = f"Saved as {path}. Every page lists {profile.name} among the devices now."
        remember(_view(), PAGE)
        st.rerun()


# --- the user's own


def _own(profiles: Profiles) -> None:
    own = own_profiles()
    if not own:
        st.info(
            escape(
                f"No device of yours in {user_folder()} yet: add one here, or measure with `ridgepoint hardware probe`."
            )
        )
        return
    st.caption(escape(f"In {user_folder()}."))
    for name, path in sorted(own.items()):
        profile = profiles.get(name)
        row = st.columns([3, 3, 1, 2, 1], vertical_alignment="center")
        row[0].markdown(f"**{escape(name)}**")
        row[1].markdown(escape(f"{profile.vendor} {profile.kind}" if profile else "cannot be read, see above"))
        try:
            row[2].download_button(
                "YAML", path.read_bytes(), path.name, "application/yaml", key=f"hardware-own-{name}", on_click="ignore"
            )
        except OSError as error:
            row[2].markdown(escape(error.strerror or "unreadable"))
        sure = row[3].checkbox("Delete it for good", key=f"hardware-sure-{name}")
        if row[4].button("Delete", key=f"hardware-delete-{name}", disabled=not sure):
            try:
                gone = forget_profile(name)
            except UserError as error:
                problem(error)
                return
            st.session_state[SAID] = f"Deleted {gone}."
            remember(_view(), PAGE)
            st.rerun()
