"""Devices on the dashboard: files that are handed over, the user's folder, the form, and the page."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from hardware.profile import (
    MOST_BYTES,
    forget_profile,
    keep_profile,
    list_profiles,
    load_profile,
    own_profiles,
    parse_profile,
    profile_text,
    user_path,
)
from tests.test_dashboard import one_level


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
    "a key twice": (document() + b"vendor: other\n", "'vendor' is given twice"),
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
