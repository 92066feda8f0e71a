"""The benchmark of published tools, which must run where none of this project is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import published_tools


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "tools.json"
    published_tools.write(path, "before")

    def broken(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", broken)
    monkeypatch.setattr(sys, "argv", ["published_tools", "--repeats", "1", "--out", str(path)])
    monkeypatch.setattr(published_tools, "TOOLS", {})
    with pytest.raises(SystemExit, match=rf"^cannot write {path}: No space left on device$"):
        published_tools.main()
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]


def test_it_needs_nothing_of_this_project() -> None:
    text = Path(published_tools.__file__).read_text()
    for package in ("hardware", "perfmodel", "runtime", "benchmarks"):
        assert f"from {package}" not in text and f"import {package}" not in text
