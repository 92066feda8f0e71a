"""What a tuning run would do, before it does it: the space, the buckets, the tilings, and what the model expects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.console import clock, setting_text, table
from autotune.effort import Effort, earlier
from autotune.tuning import Request, decoding_works, plan_of, predicted_recording, tiling_works
from hardware.files import UserError, plain

if TYPE_CHECKING:
    from autotune.results import StudyResult, Subject
    from autotune.runner import Described
    from autotune.seeding import Predict
    from hardware.profile import HardwareProfile

_MOST, _FASTEST = 12, 5  # of a front in words; of settings while only lossless ones are predicted
NO_PROFILE = "no profile of this device is at hand: tune probes one, or --hardware names one"
LOSSLESS = "of settings that are not lossless nothing is expected before the pilots have told their divergence"
NO_ACCEPTANCE = "what is verified is predicted when pilots have told the acceptance, or --acceptance-histogram does"


@dataclass(frozen=True)
class Expected:
    """A setting of the predicted Pareto front. divergence: expected, from the pilots' on; 0 is lossless."""

    params: dict[str, Any]
    tokens_per_second: float
    divergence: float


@dataclass(frozen=True)
class Outlook:
    """One bucket. measured: settings that its study already holds. front: the predicted one, or the
    fastest where only lossless ones are predicted. notes: why something is not predicted."""

    name: str
    batch: int
    context: int | None
    settings: int
    measured: int
    space: list[dict[str, str]]
    front: list[Expected]
    notes: list[str]


@dataclass(frozen=True)
class DryRun:
    """The whole run. bucket_seconds: the most for one, None for no limit. tilings: (kernel, tokens), a search each."""

    effort: Effort
    budget_seconds: float | None
    bucket_seconds: float | None
    buckets: list[Outlook]
    tilings: list[tuple[str, int]]
    routing: str = ""  # of the tilings: where the experts' routes come from
    nothing_stored: str = ""  # why, where the storage holds no study yet

    def data(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = plain(self)
        return found


def dry_run(request: Request, url: str, folder: Path, budget_seconds: float | None) -> DryRun:
    """Look ahead. A model is loaded, in a child process, to know what it is; nothing is run or written."""
    stored, nothing = _stored(url)
    tilings = tiling_works(request) if request.tilings else []
    buckets = [_replayed(request, stored)] if request.replay else _decoded(request, folder, stored)
    parts = max(1, len(buckets)) * (1 + bool(tilings and buckets))
    share = None if budget_seconds is None else budget_seconds / parts
    return DryRun(
        request.effort,
        budget_seconds,
        earlier(request.effort.seconds, share),
        buckets,
        [(work.kernel, work.batch * work.slots) for work in tilings],
        tilings[0].routing if tilings else "",
        nothing,
    )


def _stored(url: str) -> tuple[dict[str, StudyResult], str]:
    """The studies that are already there, by name; and why there are none."""
    from autotune.storage import read_studies

    try:
        return {study.name: study for study in read_studies(url)}, ""
    except UserError as error:
        return {}, str(error)


def _decoded(request: Request, folder: Path, stored: Mapping[str, StudyResult]) -> list[Outlook]:
    from autotune.isolation import Child
    from autotune.local import LOAD_SECONDS, predictor, searched

    found = []
    for work in decoding_works(request) if request.decoding else ():
        with Child(work, LOAD_SECONDS) as child:
            described: Described = child.call("describe")
        subject, _ = searched(work, described, plan_of(request, None))
        profile = _profile(request, folder)
        if request.device == "cpu" and profile is None:
            found.append(_outlook(request, subject, None, stored.get(subject.name)))
        else:
            predict = predictor(described, profile, request.engine)
            found.append(_outlook(request, subject, predict, stored.get(subject.name)))
    return found


def _profile(request: Request, folder: Path) -> HardwareProfile | None:
    """The one asked for, or the one an earlier run has probed here; None: none, or the one that ships for a GPU."""
    from autotune.local import probed_profile
    from hardware.profile import load_profile

    if request.hardware:
        return load_profile(request.hardware)
    return probed_profile(folder / "hardware.yaml") if request.device == "cpu" else None


def _outlook(request: Request, about: Subject, predict: Predict | None, study: StudyResult | None) -> Outlook:
    """Expected: the predictions, corrected by what was measured, if anything was."""
    from autotune.guide import Guide
    from autotune.seeding import Acceptance

    given = {1.0: tuple(round(count) for count in request.histogram)} if request.histogram else {}
    acceptance = (study.acceptance() if study else None) or (Acceptance(given) if given else None)
    notes = [NO_PROFILE] if predict is None else [] if acceptance else [NO_ACCEPTANCE]
    front: list[Expected] = []
    if predict is not None:
        expected = Guide(about.space, predict).expected(study.trials if study else (), acceptance)
        settings = [Expected(json.loads(key), *found) for key, found in expected.items()]
        if not (study and study.acceptance()):  # nothing has told yet how far the others are off
            lossless = [s for s in settings if about.space.candidate(s.params).decoding.lossless]
            front = sorted(lossless, key=lambda e: -e.tokens_per_second)[:_FASTEST]
            notes.append(LOSSLESS)
        else:
            front = _front(settings)
    return Outlook(
        about.name,
        about.workload.batch,
        about.context,
        about.space.size(),
        len(study.measured) if study else 0,
        about.space.describe(),
        front,
        notes,
    )


def _front(settings: Sequence[Expected]) -> list[Expected]:
    """Those that no other is expected to beat in both speed and divergence; the fastest first."""
    found: list[Expected] = []
    for setting in sorted(settings, key=lambda e: (-e.tokens_per_second, e.divergence)):
        if not found or setting.divergence < found[-1].divergence:
            found.append(setting)
    return found


def lines(found: DryRun) -> list[str]:
    """For people."""
    wanted, limit = found.effort, found.bucket_seconds
    time = "" if limit is None else f", at most {clock(limit)} each"
    buckets = "1 bucket" if len(found.buckets) == 1 else f"{len(found.buckets)} buckets"
    said = [
        f"{buckets}: up to {wanted.trials} settings{time}; each decodes {wanted.prompts} prompts of "
        f"up to {wanted.new_tokens} new tokens {wanted.repeats} times; the best meets the default in {wanted.rounds} "
        "rounds"
    ]
    said = said if found.buckets else []
    if found.budget_seconds is not None:
        said.append(f"the budget is {clock(found.budget_seconds)} for all of it")
    said += [found.nothing_stored] if found.nothing_stored else []
    for bucket in found.buckets:
        said += ["", f"{bucket.name}: {bucket.settings:,} settings, {bucket.measured} measured"]
        rows = [("parameter", "values", "if", "meaning")]
        rows += [(row["name"], row["values"], row["condition"], row["meaning"]) for row in bucket.space]
        said += table(rows)
        if bucket.front:
            said.append("expected to be best, by speed and divergence:")
            ranked = [
                (f"{e.tokens_per_second:,.0f} tokens/s", f"{e.divergence:.2%}", setting_text(e.params))
                for e in bucket.front[:_MOST]
            ]
            said += table(ranked)
        said += bucket.notes
    if found.tilings:
        kernels = dict.fromkeys(kernel for kernel, _ in found.tilings)
        tokens = sorted({count for _, count in found.tilings})
        said += [
            "",
            f"tilings of {', '.join(kernels)} at {', '.join(map(str, tokens))} tokens: the default and the best",
        ]
        said[-1] += f" {wanted.tilings} by the model of each, {len(found.tilings)} searches; routing {found.routing}"
    return said


def _replayed(request: Request, stored: Mapping[str, StudyResult]) -> Outlook:
    from autotune.replay import read_recording

    assert request.replay is not None
    about = read_recording(request.replay).subject
    predict = predicted_recording(request, about) if request.hardware else None
    return _outlook(request, about, predict, stored.get(about.name))
