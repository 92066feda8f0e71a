"""Who measures which setting: one row each, which the database gives to one worker only."""

from __future__ import annotations

import hashlib

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, insert, inspect, select, update
from sqlalchemy.exc import IntegrityError

from autotune.patience import Patience
from autotune.storage import CLAIMS, connect, creating, database_errors, has_studies, shown

_LONGEST_KEY = 500  # characters: an index holds no more than about 2,700 bytes
_claims = Table(
    CLAIMS,
    MetaData(),
    Column("study", String(512), primary_key=True),
    Column("key", String(_LONGEST_KEY), primary_key=True),
    Column("trial", Integer, nullable=False),
)


class Claims:
    """The claims of a storage. UserError when the database cannot be used, or stays away for too long."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._patience = Patience(shown(url))
        with database_errors(url):
            self._engine = connect(url)
            self._patience.run(self._create)

    def _create(self) -> None:
        has_studies(self._engine, self._url)
        if not inspect(self._engine).has_table(CLAIMS):
            with creating(self._engine):
                _claims.create(self._engine, checkfirst=True)

    def take(self, study: str, key: str, trial: int) -> int:
        """Claim `key` for a trial; the number of the trial that holds it: this one, or the one that came first."""
        with database_errors(self._url):
            return self._patience.run(lambda: self._take(study, key, trial))

    def take_over(self, study: str, key: str, lost: int, trial: int) -> bool:
        """Claim what trial `lost` held, or what nobody holds. False when another trial was faster."""
        with database_errors(self._url):
            return self._patience.run(lambda: self._take_over(study, key, lost, trial))

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def _take(self, study: str, key: str, trial: int) -> int:
        key = _short(key)
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(_claims).values(study=study, key=key, trial=trial))
        except IntegrityError:  # somebody's, perhaps ours: an answer that was lost is asked for again
            with self._engine.connect() as connection:
                return _holder(connection, study, key)
        return trial

    def _take_over(self, study: str, key: str, lost: int, trial: int) -> bool:
        key = _short(key)
        ours = (_claims.c.study == study) & (_claims.c.key == key) & (_claims.c.trial == lost)
        with self._engine.begin() as connection:
            connection.execute(update(_claims).where(ours).values(trial=trial))
        return self._take(study, key, trial) == trial


def _holder(connection: Connection, study: str, key: str) -> int:
    query = select(_claims.c.trial).where((_claims.c.study == study) & (_claims.c.key == key))
    return int(connection.execute(query).scalar_one())


def _short(key: str) -> str:
    return key if len(key) <= _LONGEST_KEY else hashlib.sha256(key.encode()).hexdigest()
