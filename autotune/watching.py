"""Studies looked at again and again while others tune: only what is new is read, and nothing is written.

Optuna's own reading makes an object of every row, which takes a second for 1,500 trials; this reads the rows.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyModel,
    StudyUserAttributeModel,
    TrialModel,
    TrialParamModel,
    TrialUserAttributeModel,
)
from sqlalchemy import Connection, select

from autotune.results import Decision, StudyResult, Subject, TrialRecord
from autotune.sole_worker import has_sole_worker
from autotune.storage import database_errors, drawn_record, open_storage, record_of, shown
from autotune.tiling_results import TilingResult
from autotune.tiling_study import SUBJECT as TILING_SUBJECT
from autotune.tiling_study import read_tiling_study
from hardware.files import UserError, build

_AT_ONCE = 500  # trials in one statement: databases limit how many values it names
# A trial in a database, and when it was begun: another study in the place of one has the same numbers.
_Row = tuple[int, datetime | None]
_QUIET_SECONDS = 600.0  # after which a study without a decision is taken for abandoned

cached_distribution = functools.lru_cache(maxsize=1024)(json_to_distribution)


@dataclass(frozen=True)
class Contents:
    """What a storage holds: the names of its studies by model, batch and context, and its searches of tilings."""

    studies: tuple[str, ...]
    tilings: tuple[str, ...]


class Watch:
    """A storage that is looked at again and again, by one thread at a time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._finished: dict[int, dict[_Row, TrialRecord]] = {}  # by study
        self._lock = threading.Lock()

    def contents(self) -> Contents:
        """What is there now. UserError where nothing is, or it cannot be read."""
        with self._looking() as (_, connection):
            attributes = _attributes(connection)
        found = {name: build(Subject, a["subject"], f"study {name!r}") for name, a in attributes if "subject" in a}
        tilings = sorted(name for name, a in attributes if TILING_SUBJECT in a)
        if not found and not tilings:
            raise UserError(f"{shown(self.url)} holds no study of `ridgepoint tune`")
        ordered = sorted(found, key=lambda n: (found[n].model, found[n].workload.batch, found[n].context or 0))
        return Contents(tuple(ordered), tuple(tilings))

    def study(self, name: str) -> StudyResult:
        """A study as it stands. UserError for one that is not there or was not made by `ridgepoint tune`."""
        where = f"study {name!r}"
        with self._looking() as (_, connection):
            place = connection.scalar(select(StudyModel.study_id).where(StudyModel.study_name == name))
            attributes = dict(_attributes(connection, place)).get(name, {})
            if place is None or "subject" not in attributes:
                raise UserError(f"{where} is not there, or was not made by `ridgepoint tune`")
            subject = build(Subject, attributes["subject"], where)
            trials = self._trials(connection, place, subject, name)
        decision = attributes.get("decision")
        return StudyResult(name, subject, trials, build(Decision, decision, where) if decision else None)

    def tilings(self) -> list[TilingResult]:
        """Its searches of tilings, by model, kernel and tokens."""
        with self._looking() as (storage, connection):
            names = [name for name, attributes in _attributes(connection) if TILING_SUBJECT in attributes]
            found = [read_tiling_study(optuna.load_study(study_name=name, storage=storage)) for name in names]
        return sorted(found, key=lambda r: (r.subject.model, r.subject.kernel, r.subject.tokens, r.subject.dtype))

    def running(self, result: StudyResult) -> bool:
        """Whether somebody tunes the study: a file's lock says it, a database is asked for what began lately."""
        alone = has_sole_worker(self.url)
        return running(result) if alone is None else alone

    @contextmanager
    def _looking(self) -> Iterator[tuple[RDBStorage, Connection]]:
        with self._lock, database_errors(self.url):
            storage = open_storage(self.url, create=False)
            try:
                with storage.engine.connect() as connection:
                    yield storage, connection
            finally:
                storage.remove_session()
                storage.engine.dispose()

    def _trials(self, connection: Connection, place: int, subject: Subject, name: str) -> tuple[TrialRecord, ...]:
        started = TrialModel.__table__.c.datetime_start  # the column: its attribute has another name in each version
        columns = select(TrialModel.trial_id, TrialModel.number, started)
        rows = connection.execute(columns.where(TrialModel.study_id == place))
        there: dict[_Row, int] = {(trial, begun): number for trial, number, begun in rows}
        found = {row: record for row, record in self._finished.get(place, {}).items() if row in there}
        new = sorted(there.keys() - found.keys(), key=lambda row: row[0])
        for some in (new[i : i + _AT_ONCE] for i in range(0, len(new), _AT_ONCE)):
            # Attributes first: the parameters of a trial whose result is there were stored before it.
            trials = [trial for trial, _ in some]
            attributes, params = _trial_attributes(connection, trials), _params(connection, trials)
            for row in some:
                record = record_of(there[row], attributes[row[0]], params[row[0]], name)
                found[row] = drawn_record(record, subject.space)
        self._finished[place] = {row: record for row, record in found.items() if record.outcome is not None}
        return tuple(sorted(found.values(), key=lambda t: t.number))


def running(result: StudyResult, now: datetime | None = None) -> bool:
    """Whether somebody seems to tune a study: a trial began lately, and is not finished or nothing was decided since.

    A worker that was killed leaves the same for ten minutes.
    """
    now = now or datetime.now(UTC)
    begun = max((t.begun for t in result.trials if t.begun), default="")
    quiet = now - timedelta(seconds=_QUIET_SECONDS)
    if begun < f"{quiet:%Y-%m-%dT%H:%M:%SZ}":  # as texts, in the form in which a trial has it
        return False
    decision = result.decision
    unfinished = any(t.outcome is None for t in result.trials)
    return unfinished or decision is None or decision.measured < len(result.measured)


def _attributes(connection: Connection, study: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    statement = select(StudyModel.study_name, StudyUserAttributeModel.key, StudyUserAttributeModel.value_json).join(
        StudyUserAttributeModel, StudyUserAttributeModel.study_id == StudyModel.study_id
    )
    if study is not None:
        statement = statement.where(StudyModel.study_id == study)
    found: dict[str, dict[str, Any]] = {}
    for name, key, value in connection.execute(statement):
        found.setdefault(name, {})[key] = json.loads(value)
    return list(found.items())


def _trial_attributes(connection: Connection, trials: Sequence[int]) -> dict[int, dict[str, Any]]:
    table = TrialUserAttributeModel
    found: dict[int, dict[str, Any]] = {trial: {} for trial in trials}
    for trial, key, value in connection.execute(
        select(table.trial_id, table.key, table.value_json).where(table.trial_id.in_(trials))
    ):
        found[trial][key] = json.loads(value)
    return found


def _params(connection: Connection, trials: Sequence[int]) -> dict[int, dict[str, Any]]:
    table = TrialParamModel
    found: dict[int, dict[str, Any]] = {trial: {} for trial in trials}
    for trial, name, value, kind in connection.execute(
        select(table.trial_id, table.param_name, table.param_value, table.distribution_json)
        .where(table.trial_id.in_(trials))
        .order_by(table.param_id)
    ):
        try:
            distribution: BaseDistribution = cached_distribution(kind)
            found[trial][name] = distribution.to_external_repr(value)
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"parameter {name!r} of a trial is damaged: {value!r} of {kind!r}") from error
    return found
