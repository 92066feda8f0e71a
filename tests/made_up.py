"""A made-up machine for the tuner's tests: speeds are looked up, not measured. Nothing here needs torch."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autotune.objective import Outputs
from autotune.results import StudyResult, Subject
from autotune.seeding import Acceptance, Prediction
from autotune.space import Candidate, Parameter, Space, decoding_space, default_candidate
from autotune.storage import STUDY_FILE, open_storage, storage_url
from autotune.study import tune
from perfmodel.acceptance import histogram_from_rates, judged, tokens_per_step
from runtime.config import DecodingConfig, Workload
from runtime.measurement import Measurement

DEVICE = {"device": "abacus", "cpu": "abacus", "cores": 2, "python": "3.11", "torch": "2.13", "system": "Linux 6"}
MODE_SECONDS = {"loop": 1.0, "grouped": 0.8, "gather": 1.3, "dense": 2.0}


@cache
def acceptance_length(decoding: DecodingConfig) -> float:
    """A draft is right with probability 0.8, more often the less the verifier counts."""
    rate = 0.8 + 0.15 * (1 - decoding.mixing_weight)
    return tokens_per_step(decoding, rates=[rate] if judged(decoding) else None)


def speed(candidate: Candidate, batch: int = 1) -> float:
    """Tokens per second on the made-up machine: overhead, then time by slots, experts and threads."""
    decoding, kernels = candidate
    mode = MODE_SECONDS[kernels.expert_mode(batch * decoding.slots)]
    forward = 1.0 + mode * (0.1 * decoding.slots * batch) / (kernels.threads or 1) ** 0.5
    return batch * 100 * acceptance_length(decoding) / (decoding.forwards_per_step * forward)


class MadeUp:
    """A runner that looks speeds up instead of measuring them, with noise; `faults` break some settings."""

    def __init__(
        self,
        *,
        batch: int = 1,
        noise: float = 0.01,
        fault: Callable[[Candidate], None] = lambda candidate: None,
        infeasible: Callable[[Candidate], str | None] = lambda candidate: None,
        gain: Callable[[Candidate, int], float] = speed,
    ) -> None:
        self.batch, self.noise, self.fault, self.infeasible, self.gain = batch, noise, fault, infeasible, gain
        self.measured: list[Candidate] = []
        self.compared: list[Candidate] = []
        self.rng = random.Random(0)

    def sample(self, candidate: Candidate) -> float:
        return self.gain(candidate, self.batch) * self.rng.lognormvariate(0, self.noise)

    def numerics(self, candidate: Candidate) -> dict[str, float]:
        self.fault(candidate)
        return {"logit_error": 1e-6}

    def micro_benchmark(self, candidate: Candidate) -> float:
        decoding = candidate.decoding
        return self.batch * acceptance_length(decoding) / self.sample(candidate)

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        self.measured.append(candidate)
        decoding, kernels = candidate
        steps = 1000
        histogram: list[int] = []
        if judged(decoding):
            rate = 0.8 + 0.15 * (1 - decoding.mixing_weight)
            histogram = [round(steps * s) for s in histogram_from_rates([rate], decoding.draft_tokens)]
        elif decoding.drafts:
            histogram = [0] * (decoding.draft_tokens - 1) + [steps]
        record = Measurement(
            kind="generation",
            model="made-up",
            model_hash="0",
            device=DEVICE,
            command="",
            commit="",
            date="",
            workload=Workload(self.batch),
            decoding=decoding,
            kernels=kernels,
            slots=decoding.slots,
            context=10,
            seconds=(1000 / self.sample(candidate),),
            tokens=(1000,),
            acceptance_histogram=tuple(histogram),
            experts_per_layer=min(8.0, self.batch * decoding.slots),
        )
        lost = 0.0 if decoding.lossless else 0.3 if not judged(decoding) else (1 - decoding.mixing_weight) / 10
        return record, [[round(1e6 * lost)]]

    def quality(self, outputs: Outputs) -> dict[str, float]:
        return {"divergence": outputs[0][0] / 1e6, "exact_match": 0.5}

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        self.compared.append(candidate)
        return self.sample(default), self.sample(candidate)

    def close(self) -> None:
        pass


def oracle(candidate: Candidate, acceptance: Acceptance | None) -> Prediction | None:
    """Predictions that know the machine but for a factor that grows with K."""
    if judged(candidate.decoding) and acceptance is None:
        return None
    length = acceptance_length(candidate.decoding)
    predicted = speed(candidate) * (1 + 0.01 * candidate.decoding.draft_tokens)
    return Prediction(predicted, length / predicted, length)


def blind(candidate: Candidate, acceptance: Acceptance | None) -> Prediction | None:
    return None


def subject(*, batch: int = 1, **changes: Any) -> Subject:
    base = Subject("made-up", "0", DEVICE, Workload(batch), "prompts", decoding_space(batch=batch, cores=2))
    return replace(base, **changes)


@contextmanager
def unsynced() -> Iterator[None]:
    """SQLite waits for the disk at every commit, which is most of a made-up trial's time."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def hurry(connection: Any, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):  # a PostgreSQL's knows no pragma
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hurry)
    try:
        yield
    finally:
        event.remove(Engine, "connect", hurry)


def small_space(*, batch: int = 1, lossless: bool = True) -> Space:
    """A space that is searched fast: four numbers of drafts, two expert modes."""
    space = decoding_space(batch=batch, cores=2, lossless=lossless)

    def fewer(parameter: Parameter) -> Parameter:
        if parameter.name == "draft_tokens":
            return replace(parameter, low=3, high=24, step=7)
        if parameter.name == "mixing_weight":
            return replace(parameter, step=0.25)
        if parameter.name in ("experts_single", "experts_block"):
            return replace(parameter, choices=("loop", "gather"))
        return parameter

    return replace(space, parameters=tuple(map(fewer, space.parameters)))


@cache
def _empty_storage() -> bytes:
    """A study file without a study: its tables take longer to make than a made-up trial."""
    with TemporaryDirectory() as folder, unsynced():
        open_storage(storage_url(folder), create=True).engine.dispose()
        return (Path(folder) / STUDY_FILE).read_bytes()


def run(folder: Path, runner: MadeUp, about: Subject | None = None, **options: Any) -> StudyResult:
    about = about or subject()
    file = folder / STUDY_FILE
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_empty_storage())
    default = default_candidate(about.space, 2)
    return tune(storage_url(folder), about, runner, **{"default": default, "predict": oracle, "trials": 12, **options})
