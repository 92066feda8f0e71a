"""Reading files strictly and writing them safely.

It lives in the lowest package so that every other package may use it. Nothing here executes what it reads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import reprlib
import tempfile
import types
import typing
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml

T = TypeVar("T")
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 200
_DEEPEST = 500
_MOST_BITS = 4096  # Python refuses to print a few times more
_MOST_NODES = 1_000_000  # of a document with aliases
_FastLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser where PyYAML was built with it


class _StrictLoader(_FastLoader):
    """A safe loader for which a key given twice is an error; YAML's own rule is that the last one silently wins."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            # A 13th month, thousands of digits, "!!bool x": PyYAML lets whatever its own code meets pass.
            told = str(error) if isinstance(error, ValueError) else f"no {node.tag.rsplit(':', 1)[-1]}"
            raise yaml.constructor.ConstructorError(None, None, told, node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # PyYAML refuses what is none
            if not isinstance(key.value, str):
                continue  # not a plain key: the loader itself refuses it
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: Any) -> Any:
        """A number; YAML 1.1 reads 12:30 as 750 (base 60), and long ones of that kind take minutes."""
        if ":" in node.value:
            raise yaml.constructor.ConstructorError(
                None, None, "a number with colons must be in quotes (text) or in decimals", node.start_mark
            )
        if node.tag.endswith(":float"):
            return self.construct_yaml_float(node)
        number = self.construct_yaml_int(node)
        if number.bit_length() > _MOST_BITS:
            raise yaml.constructor.ConstructorError(None, None, "a number has too many digits", node.start_mark)
        return number


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _StrictLoader.construct_number)


class UserError(Exception):
    """A failure the user can mend. The command prints its one line and exits with code 2.

    Where it is a value in a document that breaks a rule, `rule` is the message without the file's name, `place` the
    keys and indices that lead to the value, and `others` are further faults of the document.
    """

    def __init__(
        self,
        message: str,
        *,
        rule: str | None = None,
        place: tuple[str | int, ...] = (),
        others: Iterable[UserError] = (),
    ) -> None:
        super().__init__(message)
        self.rule = message if rule is None else rule
        self.place = place
        self.others = tuple(others)

    def each(self) -> tuple[UserError, ...]:
        """This fault and the others."""
        return (self, *self.others)


def refuse(faults: Iterable[UserError]) -> None:
    """Raise the first of the faults, with the others, if there is any."""
    found = [each for fault in faults for each in fault.each()]
    if found:
        first, *others = found
        raise UserError(str(first), rule=first.rule, place=first.place, others=others) from first


def known(kind: str, name: str, names: Iterable[str]) -> UserError:
    """The error for an unknown name: it lists the known ones."""
    return UserError(f"unknown {kind} {name!r}; known: {', '.join(sorted(names))}")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse a YAML mapping (safe loader: no tags, no code). Raises UserError with the path and the line."""
    return parse_yaml(_text_of(path), str(path))


def build_file(cls: type[T], path: str | os.PathLike[str]) -> T:
    """`build` of a YAML file, as `build_yaml` does it."""
    return build_yaml(cls, _text_of(path), str(path))


def _text_of(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no path at all
        raise UserError(f"cannot read {path}: {error}") from error


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Parse a text that holds a YAML mapping, as `read_yaml` does; `where` names it in the message."""
    try:
        if _nesting(text) > _DEEPEST:
            raise RecursionError
        data = _load(text)
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    except yaml.YAMLError as error:
        found = " ".join(str(error).split()).replace(' in "<unicode string>",', " at")
        raise UserError(f"{where} is not valid YAML: {found}") from error
    if not isinstance(data, dict):
        raise UserError(f"{where} must hold a mapping, but holds {type(data).__name__}")
    return data


def _load(text: str) -> Any:
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if "*" in text:
            _expanded(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def build_yaml(cls: type[T], text: str, where: str) -> T:
    """`build` of a text that holds a YAML mapping. A fault at a place of the document says its line too."""
    data = parse_yaml(text, where)
    try:
        return build(cls, data, where)
    except UserError as error:
        loader = _StrictLoader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
        refuse(_with_line(fault, root) for fault in error.each())
        raise


def _with_line(fault: UserError, root: Any) -> UserError:
    """The fault, with the line of its value or, where that is missing, of what should hold it."""
    line, node = 0, root
    for part in fault.place:
        parts: dict[str | int, tuple[Any, Any]] = {}  # where each begins, and what it is
        if isinstance(node, yaml.MappingNode):
            parts = {key.value: (key, value) for key, value in node.value}
        elif isinstance(node, yaml.SequenceNode):
            parts = {index: (value, value) for index, value in enumerate(node.value)}
        if part not in parts:
            break
        begin, node = parts[part]
        line = begin.start_mark.line + 1
    said = f"{fault} (line {line})" if line else str(fault)
    return UserError(said, rule=fault.rule, place=fault.place)


def _expanded(node: Any, seen: dict[int, int]) -> int:
    """How many nodes a document has with every alias written out: ten lines can stand for billions.

    YAML's own classes would share them, but merged keys, copies and messages do not. An alias inside what it names
    has no end.
    """
    if id(node) in seen:
        if not seen[id(node)]:
            raise yaml.composer.ComposerError(None, None, "an alias stands inside what it names", node.start_mark)
        return seen[id(node)]
    seen[id(node)] = 0
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in parts for part in pair]
    seen[id(node)] = size = 1 + sum(_expanded(part, seen) for part in parts)
    if size > _MOST_NODES:
        raise yaml.composer.ComposerError(None, None, "aliases stand for too much", node.start_mark)
    return size


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


def _brief(value: Any) -> str:
    """A value in a message: its start, whatever its size."""
    return _BRIEF.repr(value)


def _collected(faults: list[UserError], key: str | int, kind: Any, value: Any, where: str) -> Any:
    """The converted value; its faults are collected under its key."""
    try:
        return _convert(kind, value, where)
    except UserError as error:
        faults += [UserError(str(e), rule=e.rule, place=(key, *e.place)) for e in error.each()]
        return None


def _wrong(where: str, rule: str, *place: str | int) -> UserError:
    return UserError(f"{where}: {rule}", rule=rule, place=place)


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
            raise _wrong(where, f"must be one of {', '.join(map(str, arguments))}, but is {_brief(value)}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, f"must be a list, but is {_brief(value)}")
        if origin is tuple and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise _wrong(where, f"must have {len(arguments)} entries, but has {len(value)}")
            kinds = arguments
        else:
            kinds = (arguments[0],) * len(value)
        faults: list[UserError] = []
        found = [
            _collected(faults, i, a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(kinds, value, strict=True))
        ]
        refuse(faults)
        return origin(found)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(where, f"must be a mapping, but is {_brief(value)}")
        wrong: list[UserError] = []
        mapped = {
            _collected(wrong, str(k), arguments[0], k, f"{where} (key)"): _collected(
                wrong, str(k), arguments[1], v, f"{where}.{k}"
            )
            for k, v in value.items()
        }
        refuse(wrong)
        return mapped
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, where)
    if isinstance(value, int) and value.bit_length() > 63:  # beyond any array, and perhaps beyond printing
        raise _wrong(where, f"must be a whole number below 2**63, but has {value.bit_length()} bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e9 (no dot) as text
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(where, f"must be a {kind.__name__}, but is {_brief(value)}")
    return value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """A class's annotations as types: Python compiles each again at every call."""
    return typing.get_type_hints(cls)


def _convert_dataclass(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(where, f"must be a mapping, but is {_brief(data)}")
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    listed = ", ".join(sorted(fields))
    faults = [
        _wrong(where, f"unknown key {_brief(key)}; known: {listed}", str(key)) for key in data if key not in fields
    ]
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for name in missing:
        names = missing if name == missing[0] else [name]  # the message that is shown alone names all
        faults.append(_wrong(where, f"missing key {', '.join(map(repr, names))}", name))
    values = {
        name: _collected(faults, name, hints[name], value, f"{where}: {name}")
        for name, value in data.items()
        if name in fields
    }
    refuse(faults)
    try:
        return cls(**values)
    except ValueError as error:
        raise _wrong(where, str(error)) from error
    except UserError as error:
        wrong = [UserError(f"{where}: {e}", rule=e.rule, place=e.place) for e in error.each()]
        raise UserError(str(wrong[0]), rule=error.rule, place=error.place, others=wrong[1:]) from error
