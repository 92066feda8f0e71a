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


def _quicken() -> None:
    """Leave out what the interpreter does in vain, more than half of its time, in processes that do nothing else."""
    from triton.runtime import interpreter

    # Every integer operation is done in 64 bits again, and what that gives is compared in debug mode alone.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    # For every call of a kernel or of its functions, the language that its module sees is patched, and then restored.
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            patch(function)
        return interpreter._LangPatchScope()  # which restores nothing

    interpreter._patch_lang = patch_once


def _serve() -> None:
    import torch

    for name in ("pytest", "runtime.engine", "runtime.kernels.check", "tests.models"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    _quicken()
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
