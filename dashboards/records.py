"""Our runtime's own records beside predictions: of a checkout's measurements/, of local runs, of an uploaded file.

A folder's records are predicted by the profile and the engine that lie beside them, as `ridgepoint bench`, `hardware
probe`, `calibrate` and `demo` leave them. Files are found, never named by an address.
"""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dashboards.pairs import Fit, Kind, Pair, Pairs, joined
from dashboards.record_files import ENGINE, PROFILES, STUDY, File
from hardware.files import UserError, read_json
from hardware.profile import HardwareProfile, list_profiles, load_profile, user_folder
from perfmodel.engine import OURS, EngineProfile, engine_for, load_engine
from perfmodel.experts import ExpertCoverage, load_measured
from perfmodel.model_spec import known_models
from perfmodel.published.predict import BEYOND
from perfmodel.published.rows import MOST
from perfmodel.validation import SAMPLER, Row, point_name, recorded_coverage, validate
from runtime.config import require
from runtime.measurement import Measurement, parse_jsonl, read_jsonl

MOST_BYTES = 32 * 1024 * 1024  # of one file of records
_FITS: dict[bool | None, Fit] = {True: "fitted", False: "held out", None: "not fitted"}
_SAMPLED = "the sampler's own time, which is no part of a forward"


# --- reading and predicting folders


def predicted_folders(files: Sequence[File], kind: Kind, start: Path) -> Pairs:
    """The records in these files beside predictions. A file that is broken is a problem, and the rest is still there.

    start: what paths are shown relative to. Of our own studies, the trials of the front stand beside what was predicted
    before they ran.
    """
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(Path(file.path).parent, []).append(Path(file.path))
    too_long = {file.path for file in files if file.size_bytes > MOST_BYTES}
    parts = []
    for folder, paths in folders.items():
        records, part = _read_folder(folder, [p for p in paths if p.suffix == ".jsonl"], too_long, start)
        parts.append(part)
        if records:
            parts.append(_predicted_folder(folder, records, kind, start))
        if kind == "ours" and folder / STUDY in paths:
            device = next((pair.device for part in parts[-1:] for pair in part.pairs), folder.name)
            parts.append(_study(folder / STUDY, device, start))
    return joined(parts)


Records = dict[Path, list[Measurement]]


def _read_folder(folder: Path, paths: Sequence[Path], too_long: set[str], start: Path) -> tuple[Records, Pairs]:
    records: Records = {}
    problems = []
    for path in paths:
        try:
            require(str(path) not in too_long, f"{path} is larger than {MOST_BYTES // 1024**2} MiB")
            if _holds_measurements(path):
                records[path] = read_jsonl(path)
        except UserError as error:
            problems.append(_shorter(error, start))
    return records, Pairs(problems=tuple(problems))


def _holds_measurements(path: Path) -> bool:
    """Whether a .jsonl file holds measurements, told by its first line: other records have other files.

    UserError: a first line that is no JSON, or a file that cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            first = stream.readline(1_000_000)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    try:
        data = json.loads(first or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line 1 is not valid JSON") from error
    return isinstance(data, dict) and "kind" in data and "seconds" in data


def _shorter(error: UserError, start: Path) -> str:
    """A message in one line, its paths relative."""
    return " ".join(str(error).replace(f"{start.resolve()}{os.sep}", "").split())


def _predicted_folder(folder: Path, records: Records, kind: Kind, start: Path) -> Pairs:
    every = [m for members in records.values() for m in members]
    problems: list[str] = []
    shown = _name(folder, start)
    try:
        profile, place = _profile_of(folder, every[0].device)
    except UserError as error:
        problem = f"{shown}: its {len(every)} records have no prediction: {_shorter(error, start)}"
        return Pairs(problems=(problem,))
    engine: EngineProfile | None = None
    if (folder / ENGINE).exists():
        try:
            engine = engine_for(profile, load_engine(folder / ENGINE))
        except UserError as error:
            problems.append(_shorter(error, start))
    coverage, coverage_name = _coverage(folder, every, engine, start)
    device = _name(Path(place), start) if place.endswith(".yaml") else place
    settings = {"hardware": device, "expert-coverage": coverage_name}
    parts = []
    for path, members in records.items():
        names = [f"{shown}/{path.stem}:{n}" for n in range(1, len(members) + 1)]
        found = predicted_records(members, names, profile, engine, coverage, kind, source=f"{shown}/{path.name}")
        command = {"measurements": _name(path, start), **settings}
        if engine is not None:
            command["engine"] = _name(folder / ENGINE, start)
        parts.append(_repeated(found, "ridgepoint validate " + _options(command) + " --json"))
    return joined([*parts, Pairs(problems=tuple(problems))])


def _name(path: Path, start: Path) -> str:
    """A path as it is typed in the folder `start`."""
    try:
        return path.resolve().relative_to(start.resolve()).as_posix()
    except ValueError:
        return path.as_posix()


def _options(options: dict[str, str]) -> str:
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in options.items())


def _repeated(found: Pairs, command: str) -> Pairs:
    return replace(found, pairs=tuple(replace(pair, predicted_by=command) for pair in found.pairs))


def _profile_of(folder: Path, device: dict[str, Any]) -> tuple[HardwareProfile, str]:
    """The profile beside the records, else the user's own of this processor, and how to name it. UserError: none."""
    for name in PROFILES:
        if (folder / name).exists():
            profile = load_profile(folder / name)
            require(fits(profile, device), f"{folder / name} is of another device than its records")
            return profile, str(folder / name)
    own = [name for name, path in list_profiles().items() if path.is_relative_to(user_folder())]
    for name in own:
        profile = load_profile(name)
        if profile.kind == "cpu" and fits(profile, device):
            return profile, name
    raise UserError(
        f"no profile lies beside them; on the device they were measured on, "
        f"`ridgepoint hardware probe --out {folder / PROFILES[0]}` makes one"
    )


def fits(profile: HardwareProfile, device: dict[str, Any]) -> bool:
    """Whether a record's device can be that of a profile: of the same kind, and a processor with as many cores."""
    kind = "cpu" if device.get("device") == device.get("cpu") else "gpu"
    return profile.kind == kind and (kind == "gpu" or profile.compute_units == device.get("cores"))


def _coverage(
    folder: Path, records: Sequence[Measurement], engine: EngineProfile | None, start: Path
) -> tuple[ExpertCoverage | str, str]:
    """The distinct experts to predict with, and their name: those that were counted on this model's own routes.

    measurements/<model>/routing.json where that is beside the folder; else what the records that the engine was fitted
    to counted; else uniform routing.
    """
    models = {m.model for m in records}
    routing = folder.parent / next(iter(models)) / "routing.json"
    if len(models) == 1 and "/" not in next(iter(models)) and routing.is_file():
        return load_measured(routing), f"measured:{_name(routing, start)}"
    fitted = [m for m in records if m.kind == "forward" and m.experts_per_layer is not None]
    if engine is not None and engine.fit is not None and fitted:
        inside = [m for m in fitted if point_name(m) in set(engine.fit.points)]
        if inside:
            return recorded_coverage(inside), "recorded"
    return "uniform", "uniform"


def predicted_records(
    records: Sequence[Measurement],
    names: Sequence[str],
    profile: HardwareProfile,
    engine: EngineProfile | None,
    coverage: ExpertCoverage | str,
    kind: Kind,
    *,
    source: str,
    models: Sequence[str] | None = None,
) -> Pairs:
    """Records beside predictions; what cannot be predicted is counted by its reason.

    engine: fitted on this device; records of other engines of our runtime are predicted by those as they ship. models:
    the only names to be looked up (None: any, a path too).
    """
    groups: dict[tuple[str, str], list[int]] = {}
    reasons: Counter[str] = Counter()
    for index, m in enumerate(records):
        if m.operator == SAMPLER:
            reasons[_SAMPLED] += 1
        elif models is not None and m.model not in models:
            reasons[f"model {m.model!r} is not a known one"] += 1
        else:
            groups.setdefault((m.kernels.engine, m.model), []).append(index)
    pairs: dict[int, Pair] = {}
    for (ran, _), members in groups.items():
        try:
            found = _engine(profile, engine, ran)
            with np.errstate(over="ignore"):  # of absurd sizes: what is not finite has a reason below
                rows = validate([records[i] for i in members], profile, engine=found, expert_coverage=coverage)
        except UserError as error:
            reasons[" ".join(str(error).split("; known:")[0].split())] += len(members)
            continue
        for index, row in zip(members, rows, strict=True):
            if not (0 < row.predicted_seconds < MOST and 0 < row.measured_seconds < MOST):
                reasons[BEYOND] += 1
                continue
            pairs[index] = _pair(names[index], records[index], row, profile.name, found.name, kind, source)
    return Pairs(tuple(pairs[index] for index in sorted(pairs)), tuple(reasons.most_common()))


def _engine(profile: HardwareProfile, fitted: EngineProfile | None, ran: Any) -> EngineProfile:
    """The engine that was fitted here where it is the one that ran, else ours as it ships."""
    if fitted is not None and fitted.name.split("@")[0] == OURS.get((profile.kind, ran)):
        return fitted
    return engine_for(profile, None, ran)


def _pair(name: str, m: Measurement, row: Row, device: str, engine: str, kind: Kind, source: str) -> Pair:
    what = {"forward": m.forward or "forward", "operator": str(m.operator), "generation": m.decoding.sampler}[m.kind]
    of = {
        "forward": "one forward",
        "operator": "one operator in a forward, all layers together",
        "generation": "the mean step of a generation",
    }[m.kind]
    record = {
        "point": row.name,
        "samples": f"{len(m.seconds)}, spread {m.spread:.1%} of the median",
        "device": str(m.device.get("device", "")),
        "cores": str(m.device.get("cores", "")),
        "date": m.date,
        "commit": m.commit,
        "model": f"{m.model} ({m.model_hash})",
        "simulated": m.simulated or "",
    }
    return Pair(
        id=name,
        kind=kind,
        family={"forward": "our forward", "operator": "our operator", "generation": "our generation"}[m.kind],
        operator=f"our {m.kind}: {what}",
        device=_device_name(m, device),
        engine=engine,
        source=source,
        fit=_FITS[row.fitted],
        fit_detail={True: "fitted", False: "held out: another operating point", None: "engine without a fit"}[
            row.fitted
        ],
        of=of,
        unit="s",
        measured=row.measured_seconds,
        predicted=row.predicted_seconds,
        bound=row.bound_seconds,
        low=None,
        high=None,
        measured_seconds=row.measured_seconds,
        predicted_seconds=row.predicted_seconds,
        bound_seconds=row.bound_seconds,
        low_seconds=None,
        high_seconds=None,
        simulated=m.simulated,
        record=tuple((key, text) for key, text in record.items() if text),
        measured_by=m.command,
    )


def _device_name(m: Measurement, profile: str) -> str:
    """What was measured on: a probed processor's profile goes by a name that every such machine has."""
    cores = m.device.get("cores")
    return f"{m.device.get('device', profile)}, {cores} cores" if profile == "local-cpu" and cores else profile


# --- studies


def _study(path: Path, device: str, start: Path) -> Pairs:
    """Trials on the front of each study of a report, whose step was predicted before it was measured."""
    source, pairs = _name(path, start), []
    try:
        data = read_json(path)
        for study in data["studies"]:
            for trial in study["front"]:
                if trial["step_seconds"] and trial["predicted_step_seconds"]:
                    pairs.append(_trial(str(study["name"]), trial, device, source))
    except UserError as error:
        return Pairs(problems=(_shorter(error, start),))
    except (KeyError, TypeError, ValueError) as error:
        return Pairs(problems=(f"{source} is no report of a study: {error!r}",))
    return Pairs(tuple(pairs))


def _trial(study: str, trial: dict[str, Any], device: str, source: str) -> Pair:
    measured, predicted = float(trial["step_seconds"]), float(trial["predicted_step_seconds"])
    record = {
        "study": study,
        "trial": str(trial["number"]),
        "settings": ", ".join(f"{name} {value}" for name, value in trial["params"].items()),
        "measured tokens/s": f"{trial['tokens_per_second']:.6g}",
        "predicted tokens/s": f"{trial['predicted_tokens_per_second']:.6g}",
        "date": str(trial["begun"]),
    }
    return Pair(
        id=f"{source.removesuffix('.json')}:{study}:{trial['number']}",
        kind="ours",
        family="tuned step",
        operator=f"tuned step: {trial['params']['sampler']}",
        device=device,
        engine="as the study predicted it",
        source=source,
        fit="not fitted",
        fit_detail="predicted before the trial ran; nothing is fitted to trials",
        of="one decoding step",
        unit="s",
        measured=measured,
        predicted=predicted,
        bound=None,
        low=None,
        high=None,
        measured_seconds=measured,
        predicted_seconds=predicted,
        bound_seconds=None,
        low_seconds=None,
        high_seconds=None,
        record=tuple(record.items()),
        measured_by="ridgepoint tune (the deployment.yaml beside it has the options)",
    )


# --- uploads


def uploaded_records(text: str, name: str, profile: HardwareProfile) -> Pairs:
    """Records in an uploaded .jsonl file, predicted on a device; only models known by name are looked up.

    UserError: what is no line of records.
    """
    records = parse_jsonl(text, name)
    require(len(records) > 0, f"{name} holds no records")
    wrong = next((m for m in records if not fits(profile, m.device)), None)
    require(
        wrong is None,
        f"{name} was measured on {wrong.device.get('device') if wrong else ''}, which {profile.name} is not",
    )
    names = [f"{name}:{n}" for n in range(1, len(records) + 1)]
    return predicted_records(records, names, profile, None, "uniform", "upload", source=name, models=known_models())
