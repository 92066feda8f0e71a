"""Recorded measurements as a device: what was measured once can be searched again, anywhere, and in seconds.

A recording is a file of JSON lines: what the numbers belong to, then one line per setting.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from autotune.objective import Outcome, Outputs, StageFailure
from autotune.results import Subject
from autotune.space import Candidate, Value, default_candidate
from hardware.files import UserError, build, plain
from runtime.config import require
from runtime.measurement import Measurement

FORMAT = "ridgepoint-recording-1"


@dataclass(frozen=True)
class Head:
    """The first line of a recording: what all its settings are about."""

    format: str
    subject: Subject
    command: str
    commit: str
    date: str


@dataclass(frozen=True)
class Recorded:
    """One setting: what was set, the speed of each round, and what does not change from round to round.

    samples: tokens per second, a round each; tokens: of one pass over all prompts; loads: how many processes wanted
    the machine at each sample (the load average of a minute), ours included.
    """

    params: dict[str, Value]
    samples: tuple[float, ...] = ()
    tokens: int = 0
    forwards: int = 0  # of one pass
    step_seconds: float | None = None  # of the micro-benchmark, where one ran
    acceptance_histogram: tuple[int, ...] = ()
    experts_per_layer: float | None = None
    logit_error: float | None = None
    divergence: float | None = None
    exact_match: float | None = None
    loads: tuple[float, ...] = ()
    outcome: Outcome = "correct"
    reason: str = ""

    def __post_init__(self) -> None:
        require(all(0 < s < math.inf for s in self.samples), f"samples must be > 0, but are {self.samples}")
        if self.outcome == "correct":
            require(bool(self.samples), "a setting with the outcome 'correct' must have samples")
            require(self.tokens >= 1, f"a setting with samples must have tokens >= 1, but has {self.tokens}")
            require(self.divergence is not None, "a setting with the outcome 'correct' must have a divergence")

    @property
    def tokens_per_second(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Recording:
    """Settings of one subject. A subject's `simulated` says what of the recorded run was not real."""

    subject: Subject
    command: str
    commit: str
    date: str
    settings: tuple[Recorded, ...]

    @property
    def default(self) -> Candidate:
        """What ran untuned: with all the threads of the space."""
        threads = [p for p in self.subject.space.parameters if p.name == "threads"]
        return default_candidate(self.subject.space, int(threads[0].values()[-1]) if threads else 1)

    def spread(self) -> float:
        """How far apart two rounds of one setting are: the median over settings of |log(one / other)|; 0 for one round.

        Of a recording with this much noise, the best setting is partly the luckiest one.
        """
        gaps = [
            abs(math.log(later / earlier))
            for s in self.settings
            for earlier, later in zip(s.samples, s.samples[1:], strict=False)
        ]
        return statistics.median(gaps) if gaps else 0.0


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """Read a recording. UserError with the line's number for what is none: a cut line, an unknown key, a setting twice.

    The subject is marked as simulated: what a replay finds was measured earlier, and elsewhere.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    require(bool(lines), f"{path} is empty; a recording begins with a line that says what it is about")
    head = _parse(path, 1, lines[0])
    require(head.get("format") == FORMAT, f"{path} line 1: format must be {FORMAT!r}, but is {head.get('format')!r}")
    settings: dict[str, Recorded] = {}
    about = build(Head, head, f"{path} line 1")
    for number, line in enumerate(lines[1:], 2):
        setting = build(Recorded, _parse(path, number, line), f"{path} line {number}")
        try:
            key = about.subject.space.key(about.subject.space.candidate(setting.params))
        except (UserError, KeyError) as error:
            raise UserError(f"{path} line {number}: params must be a point of the space: {error}") from error
        require(key not in settings, f"{path} line {number}: a setting must be recorded once, but {key} is twice")
        settings[key] = setting
    what = f"replayed from {Path(path).name}"
    if all(len(setting.samples) < 2 for setting in settings.values()):
        what += ", of one round: intervals of ratios mean nothing"
    simulated = f"{about.subject.simulated}; {what}" if about.subject.simulated else what
    subject = replace(about.subject, simulated=simulated)
    return Recording(subject, about.command, about.commit, about.date, tuple(settings.values()))


def write_recording(path: Path, recording: Recording) -> None:
    """Write it, what is at its default left out; replaced at once, so that a reader never sees half of it."""
    defaults = {f.name: plain(f.default) for f in fields(Recorded)}
    head = plain(Head(FORMAT, recording.subject, recording.command, recording.commit, recording.date))
    rows = [
        head,
        *({k: v for k, v in plain(setting).items() if v != defaults.get(k, ())} for setting in recording.settings),
    ]
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


class Replay:
    """A runner that looks measurements up. A setting that was not recorded is infeasible, by name.

    pace: the share of the recorded seconds that a measurement waits; 0: none, as a search for the sake of comparing
    searches wants; 1: as long as it took, so that there is time to lose a worker in the middle of a trial.
    """

    def __init__(self, recording: Recording, pace: float = 0.0) -> None:
        require(0 <= pace < math.inf, f"pace >= 0 must hold, but got {pace}")
        self._recording, self._pace = recording, pace
        self._space = recording.subject.space
        self._keys = [self._space.key(self._space.candidate(s.params)) for s in recording.settings]
        self._settings = dict(zip(self._keys, recording.settings, strict=True))
        self._turns: dict[tuple[str, str], int] = {}  # pairs measured so far

    def infeasible(self, candidate: Candidate) -> str | None:
        """Whether it was recorded, and ran."""
        try:
            found = self._settings.get(self._space.key(candidate))
        except UserError as error:
            return f"the recording has another space: {error}"
        if found is None:
            return "the recording does not have this setting"
        return (found.reason or "it was so when recorded") if found.outcome == "infeasible" else None

    def numerics(self, candidate: Candidate) -> dict[str, float]:
        """The recorded error, if one was recorded; how a setting ended that has no speed is said here."""
        found = self._find(candidate)
        if found.outcome != "correct":
            raise StageFailure(found.outcome, found.reason or "it was so when recorded")
        return {} if found.logit_error is None else {"logit_error": found.logit_error}

    def micro_benchmark(self, candidate: Candidate) -> float:
        """The recorded seconds of a step; without a record, all its forwards at the mean seconds of one in a pass.

        Where batches drain, that is less than a full step takes, so that nothing is called slower than it is.
        """
        found = self._find(candidate)
        if found.step_seconds is not None:
            return found.step_seconds
        forward = found.tokens / found.tokens_per_second / max(found.forwards, 1)
        return forward * candidate.decoding.forwards_per_step

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        """The median sample, as one pass over the prompts."""
        found, about = self._find(candidate), self._recording.subject
        seconds = found.tokens / found.tokens_per_second
        self._wait(seconds)
        record = Measurement(
            kind="generation",
            model=about.model,
            model_hash=about.model_hash,
            device=about.device,
            command=self._recording.command,
            commit=self._recording.commit,
            date=self._recording.date,
            workload=about.workload,
            decoding=candidate.decoding,
            kernels=candidate.kernels,
            slots=candidate.decoding.slots,
            context=about.workload.prompt_tokens,
            seconds=(seconds,),
            tokens=(found.tokens,),
            forwards=found.forwards,
            acceptance_histogram=found.acceptance_histogram,
            experts_per_layer=found.experts_per_layer,
            simulated=about.simulated,
        )
        return record, [[self._keys.index(self._space.key(candidate))]]

    def quality(self, outputs: Outputs) -> dict[str, float]:
        """As recorded: tokens are not kept, so that `measure` puts out which setting they were of."""
        found = self._recording.settings[outputs[0][0]]
        known = {"divergence": found.divergence, "exact_match": found.exact_match}
        return {name: value for name, value in known.items() if value is not None}

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        """Samples of both, another pair of rounds at each call. There are rounds squared of them, then they repeat.

        Rounds of a recording are far apart in time, so that such pairs share less of the machine's mood than real ones.
        """
        one, other = self._find(default), self._find(candidate)
        names = self._space.key(default), self._space.key(candidate)
        turn = self._turns[names] = self._turns.get(names, -1) + 1
        first = one.samples[turn % len(one.samples)]
        shift = turn + turn // len(one.samples)
        second = other.samples[shift % len(other.samples)]
        self._wait(one.tokens / first + other.tokens / second)
        return first, second

    def close(self) -> None:
        """Nothing is held."""

    def _find(self, candidate: Candidate) -> Recorded:
        reason = self.infeasible(candidate)
        if reason is not None:
            raise StageFailure("infeasible", reason)
        return self._settings[self._space.key(candidate)]

    def _wait(self, seconds: float) -> None:
        if self._pace:
            time.sleep(self._pace * seconds)


def _parse(path: str | os.PathLike[str], number: int, line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number} is not valid JSON, or cut off: {error.msg}") from error
    require(isinstance(data, dict), f"{path} line {number} must hold a mapping, but holds {type(data).__name__}")
    return data  # type: ignore[no-any-return]
