"""Triton's interpreter in processes of their own: it is chosen when triton is imported.

Importing torch and triton takes seconds, so one process does it, and every call runs in a fork of that one.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
from dataclasses import replace
from functools import cache
from typing import Any


def interpreted(module: str, function: str, *arguments: Any) -> Any:
    """What the function returns in a process where Triton interprets. Arguments and results go through JSON.

    AssertionError, with the traceback, for what it raises, and where its process dies.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps([module, function, arguments]), file=server.stdin, flush=True)
    done, result = json.loads(server.stdout.readline() or '[false, "the interpreter does not start"]')
    assert done, result
    return result


@cache
def _server() -> subprocess.Popen[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.interpreter"]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # which closes its stdin, and so ends it
    return server


def _answer(request: str) -> str:
    try:
        module, function, arguments = json.loads(request)
        return json.dumps([True, getattr(importlib.import_module(module), function)(*arguments)])
    except BaseException:  # whatever a test raises is its answer
        return json.dumps([False, traceback.format_exc()])


def _serve() -> None:
    import torch
    from triton.runtime.interpreter import interpreter_builder

    for name in ("pytest", "runtime.engine", "runtime.kernels.check", "tests.models"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    # By default every integer operation is done in 64 bits again, and what that gives is compared in debug mode alone.
    assert not interpreter_builder.options.debug
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a test prints is no answer
    for request in sys.stdin:
        child = os.fork()
        if not child:
            print(_answer(request), file=answers, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps([False, f"the process died with code {code}"]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
