"""Reading strictly and writing safely: no wrong file is read silently, no failed write costs the old file."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hardware.files import UserError, build, known, parse_yaml, plain, read_json, read_yaml, write_atomic


@dataclass(frozen=True)
class Part:
    size: int
    label: str | None = None

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size >= 0 must hold, but got {self.size}")


@dataclass(frozen=True)
class Whole:
    rate: float
    active: bool
    kind: Literal["a", "b"]
    pair: tuple[int, str]
    parts: tuple[Part, ...]
    rates: dict[str, float] = field(default_factory=dict)
    buckets: dict[int, str] = field(default_factory=dict)
    stop: int | list[int] | None = None
    extra: Any = None


GOOD: dict[str, Any] = {"rate": 1, "active": True, "kind": "a", "pair": [1, "x"], "parts": [{"size": 3}]}

numbers = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(1 - 2**63, 2**63 - 1)
parts = st.builds(Part, st.integers(0, 10**9), st.none() | st.text())
wholes = st.builds(
    Whole,
    rate=numbers,
    active=st.booleans(),
    kind=st.sampled_from(["a", "b"]),
    pair=st.tuples(integers, st.text()),
    parts=st.lists(parts, max_size=4).map(tuple),
    rates=st.dictionaries(st.text(), numbers, max_size=3),
    buckets=st.dictionaries(integers, st.text(), max_size=3),
    stop=st.none() | integers | st.lists(integers),
)


@given(wholes)
def test_build_inverts_plain_through_a_yaml_file(tmp_path_factory: pytest.TempPathFactory, whole: Whole) -> None:
    path = tmp_path_factory.getbasetemp() / "whole.yaml"
    path.write_text(yaml.safe_dump(plain(whole)), encoding="utf-8")
    assert build(Whole, read_yaml(path), "whole.yaml") == whole


@given(wholes)
def test_plain_is_json(whole: Whole) -> None:
    data = plain(whole)
    data["buckets"] = {}  # JSON has no integer keys
    assert plain(build(Whole, json.loads(json.dumps(data)), "text")) == data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rat": 2}, ["unknown key 'rat'", "rate", "known"]),
        ({"parts": [{"size": 3, "sise": 4}]}, ["parts[0]", "unknown key 'sise'"]),
        ({"parts": [{}]}, ["parts[0]", "missing key 'size'"]),
        ({"parts": [{"size": -1}]}, ["parts[0]", "size >= 0", "-1"]),
        ({"parts": {"size": 1}}, ["parts", "must be a list"]),
        ({"parts": [1]}, ["parts[0]", "must be a mapping"]),
        ({"rate": "fast"}, ["rate", "must be a float", "'fast'"]),
        ({"rate": None}, ["rate", "must be a float", "None"]),
        ({"rate": True}, ["rate", "must be a float", "True"]),
        ({"active": 1}, ["active", "must be a bool", "1"]),
        ({"kind": "c"}, ["kind", "a, b", "'c'"]),
        ({"pair": [1]}, ["pair", "2 entries", "1"]),
        ({"pair": [1.5, "x"]}, ["pair[0]", "must be a int", "1.5"]),
        ({"rates": {"x": []}}, ["rates.x", "must be a float"]),
        ({"rates": []}, ["rates", "must be a mapping"]),
        ({"stop": "end"}, ["stop", "'end'"]),
        ({"rate": 10**400}, ["rate", "2**63", "1329 bits"]),
        ({"pair": [-(10**5000), "x"]}, ["pair[0]", "2**63", "bits"]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_place_and_rule(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build(Whole, GOOD | change, "some.yaml")
    assert str(error.value).startswith("some.yaml")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(UserError, match=f"missing key '{key}'"):
        build(Whole, {k: v for k, v in GOOD.items() if k != key}, "some.yaml")


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "a.yaml", "{rate: 1e9, active: no, kind: b, pair: [1, x], parts: []}")
    assert build(Whole, read_yaml(path), "a.yaml") == Whole(1e9, False, "b", (1, "x"), ())


def doubled(pattern: str) -> str:
    """Forty lines, each with two aliases of the line before."""
    return "".join(f"a{n}: &a{n} {pattern.format(f'*a{n - 1}')}\n" for n in range(1, 41))


def test_aliases_of_a_usual_size_are_followed() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n", "text") == {
        "a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2},
    }  # fmt: skip


def test_all_faults_are_found_at_once_each_with_its_place() -> None:
    wrong = GOOD | {"rate": "fast", "kind": "c", "parts": [{"size": 1}, {"size": -1}, {}], "rat": 2, "rates": {"x": []}}
    del wrong["active"]
    with pytest.raises(UserError) as error:
        build(Whole, wrong, "some.yaml")
    found = {each.place: each.rule for each in error.value.each()}
    assert set(found) == {
        ("rat",), ("active",), ("rate",), ("kind",), ("parts", 1), ("parts", 2, "size"), ("rates", "x"),
    }  # fmt: skip
    assert found["rate",] == "must be a float, but is 'fast'"
    assert all(str(each).startswith("some.yaml: ") and str(each).endswith(each.rule) for each in error.value.each())


def test_a_message_shows_the_start_of_a_long_value() -> None:
    with pytest.raises(UserError) as error:
        build(Whole, GOOD | {"rate": ["x" * 10_000] * 10_000}, "some.yaml")
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ["'a' is given twice", "line 3"]),
        ("a: {b: 1, b: 2}\n", ["'b' is given twice", "line 1"]),
        ("{[1]: 2}", ["not valid YAML", "unhashable"]),
        ("a: [1\n", ["not valid YAML", "line"]),
        ("- 1\n", ["must hold a mapping", "list"]),
        ("", ["must hold a mapping"]),
        ("a: " + "9" * 5000, ["not valid YAML", "digits"]),
        ("a: 2026-13-45", ["not valid YAML", "month"]),
        ("a: " + "[" * 100_000, ["nested too deeply"]),
        ("a: '" + "]" * 100_000 + "'\nb: " + "[" * 100_000, ["nested too deeply"]),
        ("a:\n  " + "- " * 100_000, ["nested too deeply"]),
        ("a: !!python/object/apply:os.getpid []\n", ["not valid YAML", "python"]),
        ("a: 1" + ":1" * 100_000, ["number with colons", "line 1"]),  # base 60, in quadratic time
        ("a: 1" + ":1" * 100_000 + ".5", ["number with colons", "line 1"]),
        ("a: 0x" + "f" * 20_000, ["too many digits"]),
        ("a: !!bool x\n", ["no bool", "line 1"]),
        ("a: !!timestamp x\n", ["no timestamp", "line 1"]),
        ("a: !!int ''\n", ["no int", "line 1"]),
        ("a: 1\nb: !!map [1]\n", ["not valid YAML", "line 2"]),
        ("a: &a [*a]\n", ["stands inside what it names"]),
        ("a0: &a0 [x, x]\n" + doubled("[{0}, {0}]"), ["aliases stand for too much"]),
        ("a0: &a0 {x: 1}\n" + doubled("{{<<: [{0}, {0}]}}"), ["aliases stand for too much"]),
    ],
)
def test_bad_yaml_is_one_line_with_the_path(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write_atomic(tmp_path / "bad.yaml", text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert "\n" not in str(error.value)
    for word in [str(path), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a": 1', "line 1"),
        ("[1]", "must hold an object"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON: .*digits"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["cut", "list", "digits", "deep"],
)
def test_bad_json_is_one_line_with_the_path(tmp_path: Path, text: str, word: str) -> None:
    path = write_atomic(tmp_path / "bad.json", text)
    with pytest.raises(UserError, match=word) as error:
        read_json(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_unreadable_files_are_named(tmp_path: Path, read: Any) -> None:
    binary = write_atomic(tmp_path / "binary", b"\xff\xfe\x00")
    for path in (tmp_path / "absent", tmp_path, binary, tmp_path / ("x" * 5000)):
        with pytest.raises(UserError, match="cannot read") as error:
            read(path)
        assert str(path) in str(error.value)


def test_an_unknown_name_lists_the_known_ones_in_order() -> None:
    assert str(known("fruit", "brick", ["pear", "apple"])) == "unknown fruit 'brick'; known: apple, pear"


def test_write_creates_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_atomic(path, "old")
    assert write_atomic(path, b"new \xff") == path
    assert path.read_bytes() == b"new \xff"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("call", "number"),
    [("fsync", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES), ("chmod", errno.EPERM)],
)
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = write_atomic(tmp_path / "a.txt", "old")

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=os.strerror(number)) as error:
        write_atomic(path, "new")
    assert str(path) in str(error.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "a.txt", "old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = write_atomic(tmp_path / "file", "not a folder")
    with pytest.raises(UserError, match="cannot write") as error:
        write_atomic(file / "a.txt", "new")
    assert str(file / "a.txt") in str(error.value)
    assert file.read_text() == "not a folder"
