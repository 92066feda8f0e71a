"""What is exported, and what an export target is: the parts that every target shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from autotune.results import StudyResult, TrialRecord
from autotune.tiling_results import TilingResult
from hardware.files import UserError
from hardware.fingerprint import fingerprint_key
from runtime.config import DecodingConfig, KernelConfig

Loads = Literal["loads today", "needs a fork"]
BY_HAND = "chosen by hand in the dashboard; not compared with the default in alternating rounds"


@dataclass(frozen=True)
class Target:
    """One export format.

    engine: what reads the files. file: what is written, in words. loads: whether a release of the engine takes the
    files as they are written for the models that are tuned here, or a fork is needed. does: what they say, in a line.
    out: where they go unless said otherwise. write: returns the files written; UserError names a setting that the
    format cannot represent, before anything is written.
    """

    name: str
    engine: str
    file: str
    loads: Loads
    write: Callable[[Policy, Path], list[Path]]
    does: str
    out: str


@dataclass(frozen=True)
class Chosen:
    """What a study decided to run, or a setting of it that a person picked (`by_hand`)."""

    study: StudyResult
    trial: TrialRecord
    decoding: DecodingConfig
    kernels: KernelConfig
    by_hand: bool = False

    @property
    def batch(self) -> int:
        """Sequences at once."""
        return self.study.subject.workload.batch

    @property
    def context(self) -> int | None:
        """The most cached tokens of its bucket; None: any."""
        return self.study.subject.context

    @property
    def why_single(self) -> str:
        """Of a setting that does not draft: why it is one, in words."""
        return f"autoregressive decoding was {'chosen by hand' if self.by_hand else 'fastest here'}"


@dataclass(frozen=True)
class Policy:
    """Studies and tilings of one model on one device, and the command that exports them.

    picks: by a study's name, the trial that a person chose in place of what was decided.
    """

    studies: Sequence[StudyResult] = ()
    tilings: Sequence[TilingResult] = ()
    command: str = ""
    picks: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all studies and tilings."""
        return [*(s.name for s in self.studies), *(t.name for t in self.tilings)]

    def select(self, batch: int | None = None, context: int | None = None) -> Policy:
        """Only the studies of this batch or context, for engines that take one setting. UserError names those there.

        Tilings stay: a table of them serves whatever forwards come.
        """
        if batch is None and context is None:
            return self
        found = [
            s
            for s in self.studies
            if batch in (None, s.subject.workload.batch) and (context is None or context == s.subject.context)
        ]
        if not found:
            wanted = " ".join(f"{n}={v}" for n, v in (("batch", batch), ("context", context)) if v is not None)
            raise UserError(f"nothing was tuned for {wanted}; known: {', '.join(self.names)}")
        return replace(self, studies=found)

    def chosen(self) -> list[Chosen]:
        """What was decided or picked, by batch, then by context. UserError without a study, or for an undecided one."""
        if not self.studies:
            raise UserError(f"this export needs a study of decoding, but there are only: {', '.join(self.names)}")
        found = [_chosen(study, self.picks.get(study.name)) for study in self.studies]
        return sorted(found, key=lambda c: (c.batch, c.context is None, c.context or 0))

    def one(self, engine: str) -> Chosen:
        """The only study, for an engine that takes one setting. UserError names the buckets where there are several."""
        found = self.chosen()
        if len(found) > 1:
            raise UserError(
                f"{engine} takes one setting, but there are {len(found)} buckets "
                f"({', '.join(c.study.name for c in found)}): choose one with --batch and --context"
            )
        return found[0]

    def check(self) -> None:
        """UserError unless all of it belongs to one model on one device."""
        results: list[StudyResult | TilingResult] = [*self.studies, *self.tilings]
        if not results:
            raise UserError("an export needs at least one study or tiling, but there is none")
        for kind in (self.studies, self.tilings):
            for result in kind[1:]:
                if _sizes(result) != _sizes(kind[0]):
                    raise _differ(result, kind[0])
        first = results[0]
        for result in results[1:]:
            same_device = fingerprint_key(result.subject.device) == fingerprint_key(first.subject.device)
            if not same_device or result.subject.model != first.subject.model:
                raise _differ(result, first)


def simulated(results: Sequence[StudyResult | TilingResult]) -> str | None:
    """What was not real about any of them; None where all was."""
    return "; ".join(dict.fromkeys(r.subject.simulated for r in results if r.subject.simulated)) or None


def refusal(target: str, chosen: Chosen, setting: str, value: Any, why: str) -> UserError:
    """The error for a setting that a format cannot represent: its name, its value, the study, and why."""
    return UserError(f"{target} cannot represent {setting}={value} (study {chosen.study.name!r}): {why}")


def refuse_cpu(target: str, chosen: Chosen) -> None:
    """UserError for what is set on a CPU only. How a GPU run executed is `not_carried`."""
    if chosen.kernels.engine == "lean":
        raise refusal(target, chosen, "engine", "lean", "it runs on a CPU, and this engine does not")
    if chosen.kernels.threads is not None:
        raise refusal(target, chosen, "threads", chosen.kernels.threads, "they are a CPU's, and this engine has none")


def not_carried(chosen: Chosen) -> list[str]:
    """How ridgepoint's own runtime executed a setting: other engines choose that themselves, so files cannot say it."""
    kernels = chosen.kernels
    found = [f"engine={kernels.engine}: ridgepoint's own"]
    if kernels.engine == "eager":
        found.append(f"experts={dict(kernels.experts)}: how the eager engine runs them")
    found += [f"tilings of {name}: of ridgepoint's own kernel" for name in kernels.tilings]
    return found


def _sizes(result: StudyResult | TilingResult) -> str:
    return result.subject.model_hash if isinstance(result, StudyResult) else result.subject.config_hash


def _differ(one: StudyResult | TilingResult, other: StudyResult | TilingResult) -> UserError:
    return UserError(f"an export belongs to one model on one device, but {one.name!r} and {other.name!r} differ")


def _chosen(study: StudyResult, pick: int | None) -> Chosen:
    if pick is not None and (study.decision is None or pick != study.decision.trial):
        picked = next((t for t in study.correct if t.number == pick), None)
        if picked is None:
            raise UserError(
                f"a setting that ran and was right must be picked, but trial {pick} of {study.name!r} is not"
            )
        return Chosen(study, picked, *study.candidate(picked), by_hand=True)
    if study.decision is None:
        raise UserError(f"study {study.name!r} has no decision yet: run its `ridgepoint tune` again, which continues")
    trial = study.trial(study.decision.trial)
    return Chosen(study, trial, *study.candidate(trial))
