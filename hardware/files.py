"""Reading files strictly and writing them safely.

It lives in the lowest package so that every other package may use it. Nothing here executes what it reads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml

T = TypeVar("T")
_DEEPEST = 500
_FastLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser where PyYAML was built with it


class _StrictLoader(_FastLoader):
    """A safe loader for which a key given twice is an error; YAML's own rule is that the last one silently wins."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                continue  # not a plain key: the loader itself refuses it
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class UserError(Exception):
    """A failure the user can mend. The command prints its one line and exits with code 2."""


def known(kind: str, name: str, names: Iterable[str]) -> UserError:
    """The error for an unknown name: it lists the known ones."""
    return UserError(f"unknown {kind} {name!r}; known: {', '.join(sorted(names))}")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse a YAML mapping (safe loader: no tags, no code). Raises UserError with the path and the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no path at all
        raise UserError(f"cannot read {path}: {error}") from error
    try:
        if _nesting(text) > _DEEPEST:
            raise RecursionError
        data = yaml.load(text, _StrictLoader)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits, a 13th month
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping, but holds {type(data).__name__}")
    return data


def _nesting(text: str) -> int:
    """The most that a YAML text can be nested: by its brackets, or by what its lines start with.

    The C parser recurses without a limit: a hundred thousand brackets end the process.
    """
    depths = list(accumulate(1 if c in "[{" else -1 for c in re.findall(r"[\[\]{}]", text)))
    starts = (len(line) - len(line.lstrip(" -?:")) for line in text.splitlines())
    return max(max(depths, default=0) - min(depths, default=0), max(starts, default=0))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse a JSON object. Raises UserError with the path and the place."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold an object, but holds {type(data).__name__}")
    return data


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> Path:
    """Write to a temporary name in the same folder, then rename: a reader never sees half a file.

    A full disk or an unwritable folder raises UserError and leaves the old file as it was.
    """
    path = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(payload)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def build(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build the frozen dataclass `cls` from parsed YAML or JSON, strictly.

    Unknown and missing keys are errors, and so are values of another type than the field's annotation (an int is
    accepted for a float, a list for a tuple). Nested dataclasses, tuples, dicts, optionals and literals are followed.
    `where` names the file and the place in it for the message. The class's own `__post_init__` checks ranges and
    raises UserError (or ValueError, which is turned into one).
    """
    value: T = _convert(cls, data, where)
    return value


def plain(value: Any) -> Any:
    """The inverse of `build`: dataclasses, tuples and paths as plain dicts, lists and strings for YAML or JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except UserError:
                continue
        return _convert(options[-1], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where}: must be one of {', '.join(map(str, arguments))}, but is {value!r}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: must be a list, but is {value!r}")
        if origin is tuple and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise UserError(f"{where}: must have {len(arguments)} entries, but has {len(value)}")
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
        return origin(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: must be a mapping, but is {value!r}")
        return {
            _convert(arguments[0], k, f"{where} (key)"): _convert(arguments[1], v, f"{where}.{k}")
            for k, v in value.items()
        }
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, where)
    if isinstance(value, int) and value.bit_length() > 63:  # beyond any array, and perhaps beyond printing
        raise UserError(f"{where}: must be a whole number below 2**63, but has {value.bit_length()} bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e9 (no dot) as text
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: must be a {kind.__name__}, but is {value!r}")
    return value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """A class's annotations as types: Python compiles each again at every call."""
    return typing.get_type_hints(cls)


def _convert_dataclass(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: must be a mapping, but is {data!r}")
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(fields))}")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing key {', '.join(map(repr, missing))}")
    values = {name: _convert(hints[name], value, f"{where}: {name}") for name, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
