"""A device's profile as the fields of a form, and back: what is entered, in the units people use. Streamlit-free.

A form starts from a known device. What is not changed keeps its source; what is changed needs a new one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dashboards.devices import DTYPES
from hardware.files import UserError, build, plain
from hardware.own import user_path
from hardware.profile import HardwareProfile

MOST_CACHES = 4
# Figures that a probe's curves depend on: a form that changes one of them drops the curves.
_OF_CURVES = ("compute_units", "peak_flops", "achieved_flops", "memory", "launch_seconds", "graph_node_seconds")


@dataclass(frozen=True)
class Field:
    """One field. `key` is the place of its value in the profile, with dots; `scale` is its unit in SI base units."""

    key: str
    label: str
    kind: Literal["text", "number", "whole", "choice"] = "number"
    scale: float = 1.0


@dataclass(frozen=True)
class Group:
    """Fields that share a source, which is asked for under the key `source.<key>`; no key: nothing to source."""

    key: str
    title: str
    fields: tuple[Field, ...]


def groups(caches: int) -> tuple[Group, ...]:
    """The form of a device with so many caches above its main memory."""
    peaks = tuple(Field(f"peak_flops_per_second.{d}", f"{d} (TFLOP/s)", scale=1e12) for d in DTYPES)
    achieved = tuple(Field(f"achieved_flops_per_second.{d}", f"{d} (TFLOP/s)", scale=1e12) for d in DTYPES)
    sizes: list[Field] = []
    reached: list[Field] = []
    for i in range(caches + 1):
        main = i == caches
        what, unit, scale = ("main memory", "GB", 1e9) if main else (f"cache {i + 1}", "MB", 1e6)
        sizes += [
            Field(f"memory.{i}.name", f"{what}: name", "text"),
            Field(f"memory.{i}.capacity_bytes", f"{what}: capacity ({unit})", scale=scale),
            Field(f"memory.{i}.peak_bandwidth_bytes_per_second", f"{what}: peak (GB/s)", scale=1e9),
        ]
        reached.append(Field(f"memory.{i}.achieved_bandwidth_bytes_per_second", f"{what} (GB/s)", scale=1e9))
    reached.append(Field(f"memory.{caches}.reported_bytes", "reported by driver (GB)", scale=1e9))
    return (
        Group(
            "",
            "Device",
            (
                Field("name", "Name", "text"),
                Field("vendor", "Vendor", "text"),
                Field("kind", "Kind", "choice"),
                Field("compile_target", "Compile target (sm_90)", "text"),
            ),
        ),
        Group(
            "units",
            "Compute units",
            (
                Field("compute_units", "Units (SMs, CUs, cores)", "whole"),
                Field("warp_size", "Warp size (CPU: 1)", "whole"),
                Field("shared_memory_bytes", "Shared memory of a unit (B)", "whole"),
                Field("clock_hertz", "Highest clock (GHz)", scale=1e9),
            ),
        ),
        Group("peaks", "Datasheet peaks, dense", peaks),
        Group("achieved", "Achieved by a large matmul", achieved),
        Group("memory", "Memory, from the fastest cache to main memory", tuple(sizes)),
        Group("reached", "Memory bandwidth achieved, and size reported", tuple(reached)),
        Group(
            "host",
            "Launch costs",
            (
                Field("launch_seconds", "Launch of an operator (µs)", scale=1e-6),
                Field("graph_node_seconds", "Kernel of a replayed graph (µs)", scale=1e-6),
            ),
        ),
        Group(
            "link",
            "Link to other devices of a node (no name: none)",
            (
                Field("interconnect.name", "Name", "text"),
                Field("interconnect.devices", "Devices", "whole"),
                Field("interconnect.peak_bandwidth_bytes_per_second", "Peak, one direction (GB/s)", scale=1e9),
                Field("interconnect.pair_bandwidth_bytes_per_second", "To one peer, if less (GB/s)", scale=1e9),
                Field("interconnect.achieved_bandwidth_bytes_per_second", "All-reduce achieved (GB/s)", scale=1e9),
                Field("interconnect.latency_seconds", "Small all-reduce (µs)", scale=1e-6),
            ),
        ),
        Group("power", "Power", (Field("tdp_watts", "Thermal design power (W)"),)),
        Group("price", "Price", (Field("price_dollars_per_hour", "Price ($/h)"),)),
    )


Values = Mapping[str, str | float | int | None]  # by field key; numbers in the field's unit


def values_of(profile: HardwareProfile, caches: int | None = None) -> dict[str, str | float | int | None]:
    """What the form shows of a profile, with empty caches beyond its own; the name and the new sources are empty."""
    *own, main = profile.memory
    count = len(own) if caches is None else caches
    data = plain(profile)
    data["memory"] = [*plain(own[:count]), *({} for _ in range(count - len(own))), plain(main)]
    values: dict[str, str | float | int | None] = {}
    for group in groups(count):
        for field in group.fields:
            values[field.key] = _shown(field, _at(data, field.key))
        if group.key:
            values[source_key(group)] = ""
    return values | {"name": ""}


def source_key(group: Group) -> str:
    """The key of the field for a group's source."""
    return f"source.{group.key}"


def profile_of(values: Values, base: HardwareProfile, caches: int) -> HardwareProfile:
    """The profile that is entered. UserError: all faults, each with the key of its field as its only place.

    What was left as `values_of` shows it is the base's own to the last digit, with its source.
    """
    faults: dict[tuple[str | int, ...] | str, UserError] = {}
    try:
        user_path(str(values.get("name") or ""))
    except UserError as error:
        faults[error.place] = error
    profile, found = _built(values, base, caches)
    if found:  # what is missing hides other faults: a second look has the base's values for it
        shown = values_of(base, caches)
        empty = [str(f.place[0]) for f in found if f.place and not str(values.get(str(f.place[0])) or "").strip()]
        stand_in = {key: "none" if key == "name" else shown[key] for key in empty if not key.startswith("source.")}
        found += _built({**values, **stand_in}, base, caches)[1]
    for fault in found:
        faults.setdefault(fault.place or str(fault), fault)
    if profile is None or faults:
        first, *others = faults.values()
        raise UserError(str(first), place=first.place, others=others)
    return profile


def _built(values: Values, base: HardwareProfile, caches: int) -> tuple[HardwareProfile | None, list[UserError]]:
    form = groups(caches)
    entered, sources = _entered(values, base, form, caches)
    kept = _curves_kept(entered, plain(base))
    data = entered | {
        "sources": sources | {k: v for k, v in base.sources.items() if kept and k.startswith("measured")},
        "measured": plain(base.measured) if kept else [],
        "fingerprint": base.fingerprint if kept else {},
    }
    try:
        return build(HardwareProfile, data, "form"), []
    except UserError as error:
        return None, [_placed(fault, form, data) for fault in error.each()]


def _entered(
    values: Values, base: HardwareProfile, form: tuple[Group, ...], caches: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The profile's data, and where its figures are from: the base as long as they are its own, else what is named."""
    known = base.figures()
    data: dict[str, Any] = {
        "memory": [{} for _ in range(caches + 1)],
        "peak_flops_per_second": {},
        "achieved_flops_per_second": {},
        "shared_memory_bytes": None,
    }
    for field in (field for group in form for field in group.fields):
        value = _read(field, values.get(field.key))
        if value is not None:
            _put(data, field.key, value)
    if not data.get("interconnect", {}).get("name"):
        data["interconnect"] = None
    sources: dict[str, str] = {}  # empty: not named
    for group in form:
        new = str(values.get(source_key(group)) or "").strip()
        for field in group.fields:
            value, path = _at(data, field.key), _path(field.key, data)
            if value is None or field.kind not in ("number", "whole"):
                continue
            if path in known and math.isclose(value, known[path], rel_tol=1e-11):
                _put(data, field.key, type(value)(known[path]))  # as it was, before it was rounded for the form
                sources[path] = base.source(path)
            else:
                sources[path] = new
    return data, _grouped(sources)


def _curves_kept(data: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    keys = [key for key in before if key.startswith(_OF_CURVES)]
    return bool(before["measured"]) and all(_without_none(data.get(k)) == _without_none(before[k]) for k in keys)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _grouped(sources: Mapping[str, str]) -> dict[str, str]:
    """One entry for a whole group of figures where all of them have the same source; none where it is not named."""
    found = dict(sources)
    for depth in (2, 1):  # memory.hbm first, then memory
        heads: dict[str, list[str]] = {}
        for path in found:
            parts = path.split(".")
            if len(parts) > depth:
                heads.setdefault(".".join(parts[:depth]), []).append(path)
        for head, paths in heads.items():
            if len({found[path] for path in paths}) == 1:
                text = found[paths[0]]
                for path in paths:
                    del found[path]
                found[head] = text
    return {path: text for path, text in found.items() if text}


def _placed(fault: UserError, form: tuple[Group, ...], data: Mapping[str, Any]) -> UserError:
    """A fault of the profile at the field that can mend it; with no place where there is none."""
    keys = {field.key: group for group in form for field in group.fields}
    if fault.place[:1] == ("sources",) and len(fault.place) > 1:
        path = str(fault.place[1])
        by_path = {_path(key, data): group for key, group in keys.items()}
        for figure, group in by_path.items():
            if figure == path or figure.startswith(path + "."):
                rule = "the source must be named of what is changed here or new"
                return UserError(rule, place=(source_key(group),))
    place = ".".join(map(str, fault.place))
    at = next((key for key in keys if key == place), None) or next((k for k in keys if k.startswith(place + ".")), None)
    if not at or not place:
        return UserError(str(fault))
    return UserError("must be given" if at == place and _at(data, at) is None else fault.rule, place=(at,))


def _path(key: str, data: Mapping[str, Any]) -> str:
    """The dotted path of a figure, in which memory levels go by name."""
    parts = key.split(".")
    if parts[0] == "memory":
        index = int(parts[1])
        parts[1] = str(data["memory"][index].get("name", index)) if index < len(data["memory"]) else parts[1]
    return ".".join(parts)


def _at(data: Any, key: str) -> Any:
    for part in key.split("."):
        if data is None:
            return None
        if isinstance(data, list):
            data = data[int(part)] if int(part) < len(data) else None
        else:
            data = data.get(part)
    return data


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *parts, last = key.split(".")
    holder: Any = data
    for part in parts:
        holder = holder[int(part)] if isinstance(holder, list) else holder.setdefault(part, {})
    holder[last] = value


def _shown(field: Field, value: Any) -> str | float | int | None:
    if value is None:
        return "" if field.kind == "text" else None
    return float(f"{value / field.scale:.12g}") if field.kind == "number" else value


def _read(field: Field, value: Any) -> Any:
    """The value in SI base units; None for an empty field."""
    if value is None or field.kind == "choice":
        return value
    if field.kind == "text":
        return str(value).strip() or None
    if field.kind == "whole":
        return int(value)
    return float(f"{value * field.scale:.12g}")
