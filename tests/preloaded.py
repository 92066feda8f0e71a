"""A Python that has imported torch already, for tests whose processes would each spend two seconds on that.

`preloaded()` is the path of a program that takes Python's `-c` and `-m`. What it is asked to run begins in a fork of a
process that has imported torch and nothing of ours, with the caller's arguments, environment, folder and open files, in
a group of its own. It sees the program as its `sys.executable`, so that what it starts itself begins in the same way.
The program (tests/ask_preloaded.py) ends with the same exit code or by the same signal; who kills it kills both, but
the fork may live for a moment longer. Options of Python are passed over.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing.spawn
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ASK = Path(__file__).with_name("ask_preloaded.py")
_ABOVE = 512  # files are moved out of the way to numbers from here on
_TAKING_A_VALUE = ("-W", "-X")  # of Python's options


@cache
def preloaded() -> str:
    """The program. It serves until this process ends, however it ends. Elsewhere than on Linux it is Python itself."""
    if not hasattr(os, "pidfd_open"):
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="preloaded", dir="/tmp")  # short: a socket's path has a limit
    path, program = f"{folder.name}/socket", Path(folder.name, "python")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{ASK}" {path} "$@"\n')
    program.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)  # who asks before torch is imported waits
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.preloaded", str(listener.fileno()), str(program)]
    server = subprocess.Popen(
        command,
        cwd=ASK.parents[1],
        env=environment,
        stdin=subprocess.PIPE,
        pass_fds=(listener.fileno(),),
        start_new_session=True,  # Ctrl-C is for this process alone
    )
    listener.close()
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)  # which closes its stdin, and so ends it
    return str(program)


@contextmanager
def forking() -> Iterator[None]:
    """Whatever starts a Python of its own by `sys.executable` or as `multiprocessing` spawns it gets this one."""
    before = sys.executable, multiprocessing.spawn.get_executable()
    sys.executable = preloaded()
    multiprocessing.spawn.set_executable(sys.executable)
    try:
        yield
    finally:
        sys.executable = before[0]
        multiprocessing.spawn.set_executable(before[1])


def _serve(listener: socket.socket, program: str) -> None:
    """Fork for every request, until stdin ends; tell who asked how it ended, and end what nobody waits for."""
    import torch

    assert not torch.cuda.is_initialized()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == 0:
                    for each in selector.get_map().values():
                        _end(each.data[0]) if each.data else None
                    return
                if key.fileobj is listener:
                    _begin(selector, listener.accept()[0], program)
                elif key.fd in selector.get_map():  # or both of its files were ready, and this is the second
                    _finish(selector, *key.data, asked=key.fd != key.data[2])


def _finish(
    selector: selectors.BaseSelector, child: int, connection: socket.socket, pidfd: int, *, asked: bool
) -> None:
    """The child has ended; or, asked, who waited for it has, and it must."""
    selector.unregister(connection)
    selector.unregister(pidfd)
    if asked:
        _end(child)
    _, status = os.waitpid(child, 0)
    with suppress(OSError):
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    connection.close()
    os.close(pidfd)


def _end(child: int) -> None:
    """Kill it and what it has started in its group."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _begin(selector: selectors.BaseSelector, connection: socket.socket, program: str) -> None:
    """Read a request and fork for it."""
    length, received, _, _ = socket.recv_fds(connection, 8, 64)
    with connection.makefile("rb") as stream:
        content = stream.read(int.from_bytes(length, "big"))
    if len(length) < 8 or len(content) < int.from_bytes(length, "big"):  # who asked was killed meanwhile
        for number in received:
            os.close(number)
        return connection.close()
    arguments, environment, folder, files = json.loads(content)
    child = os.fork()
    if not child:
        _become(dict(zip(files, received, strict=True)), arguments, environment, folder, program)
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(child, child)  # as it does itself: whoever is first
    for number in received:
        os.close(number)
    pidfd = os.pidfd_open(child)
    for source in (connection, pidfd):
        selector.register(source, selectors.EVENT_READ, (child, connection, pidfd))


def _become(
    files: dict[int, int], arguments: list[str], environment: dict[str, str], folder: str, program: str
) -> NoReturn:
    """The fork: run as Python would with these."""
    code = 1
    try:
        os.setpgid(0, 0)
        moved = {number: os.dup2(source, _ABOVE + place) for place, (number, source) in enumerate(files.items())}
        os.closerange(3, _ABOVE)
        for number, source in moved.items():
            os.dup2(source, number)
        os.closerange(_ABOVE, 2 * _ABOVE)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.executable = program
        multiprocessing.spawn.set_executable(program)
        sys.path[:0] = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
        sys.modules.pop("sitecustomize", None)
        importlib.invalidate_caches()
        with suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")
        _run(arguments, folder)
        code = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
    with suppress(BaseException):
        atexit._run_exitfuncs()
    with suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)


def _run(arguments: list[str], folder: str) -> None:
    """What follows `python` on a command line, of which these tests need `-c` and `-m`."""
    sys.orig_argv = [sys.executable, *arguments]
    rest = list(arguments)
    while rest[0] not in ("-c", "-m"):
        if not rest[0].startswith("-"):
            raise SystemExit(f"this Python takes -c or -m, and not {rest[0]}")
        del rest[: 2 if rest[0] in _TAKING_A_VALUE else 1]
    kind, what, *given = rest
    sys.argv = [kind, *given]
    if kind == "-m":
        sys.path.insert(0, folder)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    sys.path.insert(0, "")
    main: Any = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(what, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    del sys.path[0]  # the folder that it was started in
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
