"""The state of a page as the parameters of its address, so that a link reproduces what it shows. Streamlit-free.

A page's state is a frozen dataclass whose fields are text, numbers, truths, tuples of texts, or one of them or None,
each with a default; its `__post_init__` refuses impossible values. Names in it are known ones, never paths or database
URLs: an address that somebody sends must not make the server read a file or connect anywhere.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from hardware.files import UserError, known
from runtime.config import require

V = TypeVar("V")
NONE = ""  # how None, and a tuple without entries, stand in an address
MOST = 2**53 - 1  # of a whole number: a browser's numbers, and fields for them, reach no further
_TRUTHS = {"True": True, "False": False}


def to_query(view: Any) -> dict[str, list[str]]:
    """Every field of a view: an address goes on to show the same when a default changes."""
    return {f.name: _texts(getattr(view, f.name)) for f in dataclasses.fields(view)}


def from_query(cls: type[V], parameters: Mapping[str, Sequence[str]]) -> V:
    """The view in an address; what it leaves out has its default. UserError: unknown keys and impossible values."""
    kinds = _kinds(cls)
    values: dict[str, Any] = {}
    for key, texts in parameters.items():
        if key not in kinds:
            raise known("parameter of the address", key, kinds)
        values[key] = _value(key, kinds[key], texts)
    return cls(**values)


def _kinds(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _value(key: str, kind: Any, texts: Sequence[str]) -> Any:
    if typing.get_origin(kind) is tuple:
        return tuple(texts) if list(texts) != [NONE] else ()
    require(len(texts) == 1, f"{key} must be given once in the address, but is given {len(texts)} times")
    (text,) = texts
    if isinstance(kind, types.UnionType):
        if text == NONE:
            return None
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        kind = str  # the view refuses an unknown one and lists the known
    try:
        value = _TRUTHS[text] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"{key} must be a {kind.__name__}, but is {text!r:.80}") from error
    require(kind is not int or abs(value) <= MOST, f"{key} must be from {-MOST} to {MOST}, but is {text:.80}")
    return value


def _texts(value: Any) -> list[str]:
    if isinstance(value, tuple):
        return list(value) or [NONE]
    return [NONE if value is None else str(value)]
