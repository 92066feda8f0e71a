"""Devices on the dashboard: files that are handed over, the user's folder, the form, and the page."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

import hardware.profile
from dashboards.device_form import MOST_CACHES, groups, profile_of, source_key, values_of
from dashboards.devices import comparison_info, link, peaks_info, peaks_plot
from hardware.comparison import nearest, own_figure
from hardware.files import UserError
from hardware.own import MOST_BYTES, forget_profile, keep_profile, own_profiles, parse_profile, user_path
from hardware.profile import (
    BandwidthPoint,
    Curves,
    HardwareProfile,
    MatmulPoint,
    list_profiles,
    load_profile,
    profile_text,
)
from tests.test_dashboard import one_level

BUNDLED = sorted(path.stem for path in (Path(hardware.profile.__file__).parent / "profiles").glob("*.yaml"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own profiles: none yet."""
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hardware"


def document(name: str = "mine", **changed: Any) -> bytes:
    return profile_text(dataclasses.replace(one_level(name), **changed)).encode()


# --- files that are handed over, and the user's folder

NASTY = {
    "tags": (b"name: !!python/object/apply:os.mkdir [made]\n", "python"),
    "not UTF-8": (b"name: \xff\xfe\n", "UTF-8"),
    "NUL": (document().replace(b"vendor: none", b"vendor: a\0b"), "control characters"),
    "a key twice": (document() + b"vendor: other\n", "'vendor' is given twice at line \\d+"),
    "nested": (b"name: " + b"[" * 100_000, "nested too deeply"),
    "a bomb": (
        b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 60)),
        "aliases",
    ),
    "large": (document() + b"#" * MOST_BYTES, f"at most {MOST_BYTES:,} bytes"),
    "base 60": (b"name: 1" + b":1" * 60_000, "colons"),
    "empty": (b"", "must hold a mapping"),
    "no mapping": (b"- name\n", "must hold a mapping"),
    "two documents": (b"name: a\n---\nname: b\n", "another document"),
    "unknown key": (document() + b"cores: 3\n", "unknown key 'cores'"),
    "a path": (document().replace(b"name: mine", b"name: ../mine"), "name must be"),
}


@pytest.mark.parametrize("case", NASTY)
def test_a_file_handed_over_is_refused_in_a_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some would take minutes, or all memory."""
    monkeypatch.chdir(tmp_path)
    data, words = NASTY[case]
    with pytest.raises(UserError, match=words) as error:
        parse_profile(data, "mine.yaml")
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 1000
    assert list(tmp_path.iterdir()) == []


def test_a_fault_says_the_line_of_its_value_or_of_what_should_hold_it(tmp_path: Path) -> None:
    lines = list_profiles()["h100-sxm"].read_text().splitlines()
    places = {line.split(":")[0]: n for n, line in reversed(list(enumerate(lines)))}
    for key, value, rule, said in (
        ("launch_seconds", "launch_seconds: -1", "launch_seconds > 0 must hold", "launch_seconds"),
        ("compute_units", "compute_units: many", "compute_units: must be a int", "compute_units"),
        ("    capacity_bytes", "    capacity_bytes: []", "memory[0]: capacity_bytes: must", "    capacity_bytes"),
        ("    capacity_bytes", "    capacity: 1", "memory[0]: missing key 'capacity_bytes'", "  - name"),
        ("vendor", "wendor: x", "unknown key 'wendor'", "vendor"),
        ("  compute_units", "  computers: x", "sources must name the source of every figure", "sources"),
    ):
        path = tmp_path / "wrong.yaml"
        path.write_text("\n".join([*lines[: places[key]], value, *lines[places[key] + 1 :]]))
        with pytest.raises(UserError) as upload:
            parse_profile(path.read_bytes(), str(path))
        with pytest.raises(UserError) as file:
            load_profile(path)
        for error in (upload.value, file.value):
            fault = next(str(each) for each in error.each() if rule in str(each))
            assert fault.startswith(f"{path}: ") and fault.endswith(f"(line {places[said] + 1})")
    path.write_text("name: mine\n")  # the whole document should hold what is missing
    with pytest.raises(UserError, match=r"missing key 'vendor', .*, 'sources'$"):
        load_profile(path)


NAMES = st.one_of(
    st.sampled_from(["", ".", "..", "../up", "/etc/passwd", "a/b", "a\\b", "C:\\a", "CON", "nul.x", "com1", "a.yaml"]),
    st.sampled_from(
        ["link", "x" * 65, "x" * 5000, "über", "a b", "a\0b", "\ud800", "-rf", "~", "a:b", "a.", ".hidden"]
    ),
    st.text(max_size=8),
    st.from_regex(r"[A-Za-z0-9._-]{1,8}", fullmatch=True),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES)
def test_nothing_outside_the_users_folder_is_written_or_deleted(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    outside = folder.parent / "outside.yaml"
    outside.write_text("as it was")
    link = folder / "link.yaml"
    if not link.is_symlink():
        link.symlink_to(outside)
    before = {path for path in folder.parent.parent.rglob("*") if path.parent != folder}
    try:
        path = keep_profile(dataclasses.replace(one_level(), name=name), replace=True)
    except UserError as error:
        assert "\n" not in str(error)
        str(error).encode()  # it can be shown
        path = None
    assert path is None or (path.parent == folder and load_profile(name).name == name)
    if name != "link":
        try:
            forget_profile(name)
        except UserError:
            assert path is None
        assert set(own_profiles()) <= {"link"}
    assert outside.read_text() == "as it was"
    assert {path for path in folder.parent.parent.rglob("*") if path.parent != folder} == before


def test_the_users_own_win_are_not_replaced_unasked_and_can_be_deleted(folder: Path) -> None:
    bundled = list_profiles()["h200"]
    text = bundled.read_bytes()
    mine = parse_profile(document("h200"), "upload")
    assert keep_profile(mine) == folder / "h200.yaml" == list_profiles()["h200"]
    assert load_profile("h200") == mine != parse_profile(text, "bundled")
    with pytest.raises(UserError, match="a profile of yours already") as error:
        keep_profile(mine)
    assert error.value.place == ("name",)
    faster = dataclasses.replace(mine, launch_seconds=1e-6)
    keep_profile(faster, replace=True)
    assert load_profile("h200") == faster
    forget_profile("h200")
    assert list_profiles()["h200"] == bundled and bundled.read_bytes() == text
    with pytest.raises(UserError, match="unknown profile of yours 'h200'"):
        forget_profile("h200")


def test_files_with_names_that_cannot_be_shown_are_left_out(folder: Path) -> None:
    """Such a name in a list would end every page; one like a file's would be read from where the command runs."""
    folder.mkdir(parents=True)
    for name in (b"\xff.yaml", b"a\x01b.yaml", b"evil.yaml.yaml"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(document())
    assert own_profiles() == {}


def test_any_profile_is_downloaded_as_it_is() -> None:
    for name in list_profiles():
        assert parse_profile(profile_text(load_profile(name)).encode(), name) == load_profile(name)
    assert user_path("a-B_1.2").name == "a-B_1.2.yaml"


# --- the form


def form_of(base: HardwareProfile, caches: int | None = None, **changed: Any) -> HardwareProfile:
    count = len(base.memory) - 1 if caches is None else caches
    return profile_of(values_of(base, count) | {"name": "mine"} | changed, base, count)


@pytest.mark.parametrize("name", BUNDLED)
def test_a_device_passes_through_the_form_unchanged(name: str) -> None:
    base = load_profile(name)
    found = form_of(base)
    assert dataclasses.replace(found, name=name, sources=base.sources) == base
    assert {path: found.source(path) for path in found.figures()} == {
        path: base.source(path) for path in found.figures()
    }


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-3, 1), st.sampled_from(["peak_flops_per_second.int8", "tdp_watts", "memory.1.capacity_bytes"]))
def test_a_changed_figure_needs_a_source_and_others_keep_theirs(factor: float, key: str) -> None:
    base = load_profile("h200")
    group = next(g for g in groups(1) if key in {f.key for f in g.fields})
    value = values_of(base)[key]
    assert isinstance(value, float)
    changed = {key: value * (1 + factor)}
    with pytest.raises(UserError, match="the source must be named") as error:
        form_of(base, **changed)
    assert [fault.place for fault in error.value.each()] == [(source_key(group),)]
    found = form_of(base, **changed, **{source_key(group): "derived: a guess"})
    path = key.replace("memory.1", "memory.hbm")
    assert found.figures()[path] == pytest.approx(base.figures()[path] * (1 + factor))
    assert {p for p in found.figures() if found.source(p) != base.source(p)} == {path}


def test_all_faults_of_a_form_are_told_at_their_fields() -> None:
    wrong = {
        "name": "../up",
        "vendor": " ",
        "compute_units": -3,
        "peak_flops_per_second.fp8": 1e9,
        "memory.0.name": "",
        "launch_seconds": None,
        "price_dollars_per_hour": 1e9,
    }
    with pytest.raises(UserError) as error:
        form_of(load_profile("h100-sxm"), **wrong)
    found = {fault.place[0]: str(fault) for fault in error.value.each()}
    assert set(found) == {*wrong, "source.units", "source.peaks", "source.price"}
    assert found["launch_seconds"] == "must be given"


ENTERED = st.sampled_from([None, "", " ", "x", "l2", "hbm", "../up", 0, -1, 1, 2.5, 1e-9, 1e30])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(BUNDLED), st.integers(0, MOST_CACHES), st.data())
def test_every_fault_of_a_form_has_a_field(name: str, caches: int, data: st.DataObject) -> None:
    base = load_profile(name)
    text = {f.key for group in groups(caches) for f in group.fields if f.kind in ("text", "choice")}
    values = values_of(base, caches) | {"name": "mine"}
    for key in data.draw(st.lists(st.sampled_from(sorted(values)), max_size=5)):
        is_text = key in text or key.startswith("source.")
        values[key] = data.draw(
            ENTERED.filter(lambda v, t=is_text: isinstance(v, str) if t else not isinstance(v, str))
        )
    try:
        profile = profile_of(values, base, caches)
    except UserError as error:
        assert {fault.place[0] for fault in error.each()} <= set(values)
    else:
        assert parse_profile(profile_text(profile).encode(), "mine.yaml") == profile


def test_levels_and_links_can_be_added_and_left_out() -> None:
    base = load_profile("mi300x")
    assert [level.name for level in form_of(base, 1).memory] == ["l2", "hbm"]
    with pytest.raises(UserError) as error:
        form_of(base, 3)
    assert ("memory.2.name",) in {fault.place for fault in error.value.each()}
    assert form_of(base, **{"interconnect.name": ""}).interconnect is None
    new = {"memory.0.name": "mall", "memory.0.capacity_bytes": 1.0, "source.memory": "measured: here"}
    assert form_of(base, 1, **new, **{"source.reached": "x"}).source("memory.mall.capacity_bytes") == "measured: here"


def test_curves_are_kept_only_with_the_figures_they_belong_to() -> None:
    point = BandwidthPoint(1e6, 1e10)
    curves = Curves(1, 1e-6, 1e-6, 1e-7, (point,), (MatmulPoint("float32", 1, 8, 8, 8, 1e-6, 1e6),))
    base = one_level()
    base = dataclasses.replace(base, measured=(curves,), sources=base.sources | {"measured": "measured: here"})
    priced = form_of(base, price_dollars_per_hour=2.0, **{"source.price": "derived: mine"})
    assert priced.measured == base.measured and priced.source("measured.1.threads") == "measured: here"
    assert form_of(base, launch_seconds=9.0, **{"source.host": "derived: mine"}).measured == ()


# --- the page


def test_the_table_names_every_figure_with_unit_and_source() -> None:
    profiles = {name: load_profile(name) for name in ("l40s", "mi355x")}
    info = comparison_info(profiles)
    shown = info.shown()
    at = shown["the figure"].index("main memory: peak bandwidth")
    assert [column[at] for column in shown.values()] == [
        "main memory: peak bandwidth", "datasheet", "864 GB/s", "8 TB/s", "9.26x",
    ]  # fmt: skip
    at = shown["the figure"].index("peak rate: fp4")
    assert (shown["l40s"][at], shown["mi355x"][at], shown["largest / smallest"][at]) == (
        "",
        "10.1 PFLOP/s",
        "not on all",
    )
    assert "same" in shown["largest / smallest"]
    assert "same" not in info.shown(differing=True)["largest / smallest"]
    assert "" not in comparison_info({"l40s": profiles["l40s"]}).shown()["l40s"]
    columns = info.columns()
    for device, figure, value, source in zip(
        columns["device"], columns["figure"], columns["value"], columns["source"], strict=True
    ):
        path = own_figure(profiles[device], figure)
        assert (value, source) == (profiles[device].figures()[path], profiles[device].source(path))
    assert len(columns["value"]) == sum(len(profile.figures()) for profile in profiles.values())


@pytest.mark.parametrize(
    "source, address",
    [
        ("derived: 2 x https://a.org/b. And more", "https://a.org/b"),
        ("javascript:alert(1)", None),
        ("data:text/html,x file:///etc/passwd ftp://a.org", None),
        ('https://a.org/"onclick=x', "https://a.org/"),
        (None, None),
    ],
)
def test_only_web_addresses_become_links(source: str | None, address: str | None) -> None:
    assert link(source) == address


def test_peaks_and_what_was_achieved_are_apart() -> None:
    profiles = {name: load_profile(name) for name in ("a100-80gb-sxm", "b200")} | {"<b>x": one_level("<b>x")}
    info = peaks_info(profiles, "bfloat16")
    for point in info.points:
        assert (point.achieved_flops_per_second or 0) <= point.peak_flops_per_second
        roof = point.ridge_flops_per_byte * point.peak_bandwidth_bytes_per_second
        assert roof == pytest.approx(point.peak_flops_per_second)
    plot = peaks_plot(info)
    assert "(B/s)" in plot.layout.xaxis.title.text and "(FLOP/s)" in plot.layout.yaxis.title.text
    assert "<b>x" not in plot.to_json()
    fp4 = peaks_info(profiles, "fp4")
    assert ([p.device for p in fp4.points], fp4.left_out) == (["b200"], ("a100-80gb-sxm", "<b>x"))
    peaks_plot(peaks_info({}, "fp4"))


def test_the_nearest_device_is_one_that_is_like_it() -> None:
    others = [load_profile(name) for name in list_profiles()]
    assert {name: getattr(nearest(load_profile(name), others), "name", "") for name in ("mi300x", "rtx-4090")} == {
        "mi300x": "mi325x", "rtx-4090": "l40s",
    }  # fmt: skip
    assert nearest(others[0], others[:1]) is None


def two_pages() -> None:
    import streamlit as st

    from dashboards.views import explore, hardware

    {"hardware": hardware.page, "explore": explore.page}[st.session_state.get("page", "hardware")]()


@pytest.fixture
def page() -> AppTest:
    return AppTest.from_function(two_pages, default_timeout=60)


def part(page: AppTest, name: str) -> None:
    page.segmented_control(key="hardware-tab").set_value(name).run()
    assert not page.exception


def test_an_address_shows_the_devices_and_a_broken_file_is_one_line(page: AppTest, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "broken.yaml").write_text("name: broken\n")
    page.query_params["devices"] = ["l40s", "mi355x"]
    page.query_params["dtype"] = "fp4"
    page.run()
    assert not page.exception
    (error,) = page.error
    assert "missing key" in error.value and "\n" not in error.value
    (folder / "broken.yaml").write_bytes(document("broken"))
    page.run()
    assert not page.error and "broken" in page.multiselect(key="hardware-devices").options
    assert list(page.dataframe[0].value.columns) == [
        "the figure", "stated as", "l40s", "mi355x", "largest / smallest",
    ]  # fmt: skip
    assert page.info[0].value == "Without a fp4 rate\\: l40s."
    rows = len(page.dataframe[0].value)
    page.toggle(key="hardware-differing").set_value(True).run()
    assert len(page.dataframe[0].value) < rows
    assert page.query_params["differing"] == "True"
    page.multiselect(key="hardware-devices").set_value(["l40s"]).run()
    assert len(page.dataframe[0].value) == len(load_profile("l40s").figures())  # nothing to differ from
    page.multiselect(key="hardware-devices").set_value([]).run()
    assert page.info and not page.dataframe and not page.exception
    for name in ("/etc/passwd.yaml", "../x.yaml", "none"):
        page.query_params["devices"] = name
        page.run()
        assert "unknown hardware" in page.error[0].value and not page.exception


def test_a_device_is_entered_saved_found_everywhere_and_deleted(page: AppTest, folder: Path) -> None:
    page.query_params["tab"] = "form"
    page.run()
    page.selectbox(key="hardware-start").set_value("h200").run()
    page.number_input(key="hardware-form-tdp_watts").set_value(650.0)
    page.button(key="hardware-check").click().run()
    told = [error.value for error in page.error]
    assert len(told) == 3 and "name must be" in told[1] and "source must be named" in told[2]
    page.text_input(key="hardware-form-name").set_value("mine")
    page.text_input(key="hardware-form-source-power").set_value("derived: *a guess*")
    page.button(key="hardware-check").click().run()
    assert not page.error and not page.exception and not folder.exists()
    preview = page.dataframe[0].value
    assert list(preview.columns[2:4]) == ["mine (new)", "h200"]
    part(page, "own")
    assert page.info
    part(page, "form")  # what was entered is still there
    assert page.text_input(key="hardware-form-name").value == "mine"
    page.button(key="hardware-save").click().run()
    assert not page.exception and "Saved as" in page.success[0].value
    assert load_profile("mine").tdp_watts == 650

    page.session_state["page"] = "explore"
    page.query_params.clear()
    page.run()
    assert "mine" in page.multiselect(key="explore-devices").options
    page.session_state["page"] = "hardware"
    page.query_params.clear()
    page.run()

    part(page, "compare")
    page.multiselect(key="hardware-devices").set_value(["mine", "h200"]).run()
    part(page, "own")
    assert page.button(key="hardware-delete-mine").disabled
    page.checkbox(key="hardware-sure-mine").check().run()
    page.button(key="hardware-delete-mine").click().run()
    assert not page.exception and not page.error and "Deleted" in page.success[0].value
    assert own_profiles() == {} and page.query_params["devices"] == "h200"


def test_a_file_is_checked_previewed_and_replaces_only_when_asked(page: AppTest, folder: Path) -> None:
    page.query_params["tab"] = "file"
    page.run()
    for case in ("a bomb", "large", "a path"):
        page.file_uploader[0].set_value(("mine.yaml", NASTY[case][0], "application/yaml")).run()
        assert len(page.error) == 1 and "\n" not in page.error[0].value and not page.exception
    several = document().replace(b"vendor: none", b"vendor: ' '").replace(b"warp_size: 32", b"warp_size: -1")
    page.file_uploader[0].set_value(("mine.yaml", several, "application/yaml")).run()
    assert len(page.error) == 2 and not folder.exists()
    page.file_uploader[0].set_value(("mine.yaml", document(), "application/yaml")).run()
    assert not page.error and not folder.exists()
    page.button(key="hardware-save").click().run()
    assert load_profile("mine") == one_level("mine") and not page.exception
    assert not page.button  # the file is gone from the page
    faster = document(launch_seconds=1e-6)
    page.file_uploader[0].set_value(("mine.yaml", faster, "application/yaml")).run()
    assert page.button(key="hardware-save").disabled
    page.checkbox(key="hardware-replace-mine").check().run()
    page.button(key="hardware-save").click().run()
    assert load_profile("mine").launch_seconds == 1e-6
    page.file_uploader[0].set_value(("h200.yaml", document("h200"), "application/yaml")).run()
    assert "bundled device" in page.info[0].value
