"""Files of records: a checkout's own, and those below the folder where the dashboard was started. None is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dashboards.pairs import ROOT

PROFILES = ("hardware.yaml", "profile.yaml")
ENGINE = "engine.yaml"
STUDY = "study.json"
_DEEPEST, _MOST_FOLDERS, _MOST_FILES = 4, 2000, 200


@dataclass(frozen=True)
class File:
    """A file as it is now: another time of change or size is another key of a cache."""

    path: str
    changed_nanoseconds: int
    size_bytes: int


def our_files(root: Path = ROOT) -> tuple[File, ...]:
    """Records, studies, profiles and engines of a checkout's measurements/, one folder per device; () elsewhere."""
    return _files([(root / "measurements", 1)])


def local_files(start: Path) -> tuple[File, ...]:
    """The same below `start`/runs and in `start`/demo-out; nothing that a symbolic link leads out of them to."""
    return _files([(start / "runs", _DEEPEST), (start / "demo-out", 0)])


def _files(roots: Iterable[tuple[Path, int]]) -> tuple[File, ...]:
    return tuple(file for root, deepest in roots for file in _below(root, deepest))[:_MOST_FILES]


def _below(root: Path, deepest: int) -> list[File]:
    found = []
    top = root.resolve()
    for seen, (place, folders, names) in enumerate(os.walk(top)):
        if seen >= _MOST_FOLDERS:
            break
        folders.sort()
        if len(Path(place).relative_to(top).parts) >= deepest:
            folders.clear()
        for name in sorted(names):
            if name in (*PROFILES, ENGINE, STUDY) or name.endswith(".jsonl"):
                file = _file_below(Path(place) / name, top)
                found += [file] if file else []
    return found


def _file_below(path: Path, top: Path) -> File | None:
    """The file, unless it is none, cannot be seen, or lies elsewhere."""
    try:
        inside = path.resolve().is_relative_to(top) and path.is_file() and str(path).isprintable()
    except (OSError, RuntimeError, ValueError):  # a circle of links
        return None
    return file_of(path) if inside else None


def file_of(path: Path) -> File | None:
    """A file as it is now; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return File(str(path), status.st_mtime_ns, status.st_size)
