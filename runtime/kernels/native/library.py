"""The native kernels as a library: compiled on first use, kept in the user's folder, shared by later processes."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from hardware.files import UserError
from hardware.fingerprint import cpu_model

_FOLDER = Path(__file__).parent
# Contracting a product and a sum into one rounding is C's default with GNU extensions; nothing else is relaxed.
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall")


def home() -> Path:
    """Where compiled libraries lie: `$RIDGEPOINT_HOME/native`, or `~/.ridgepoint/native`."""
    chosen = os.environ.get("RIDGEPOINT_HOME")
    return (Path(chosen) if chosen else Path.home() / ".ridgepoint") / "native"


def compiler() -> list[str]:
    """The C compiler and its first arguments: `$CC`, or the first of cc, gcc and clang. UserError for none."""
    chosen = os.environ.get("CC", "")
    try:
        words = shlex.split(chosen)
    except ValueError as error:
        raise UserError(f"CC must be a command with its arguments, but got {chosen!r}") from error
    names = words[:1] or ["cc", "gcc", "clang"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise UserError(f"the engine lean needs a C compiler: none of {', '.join(names)} was found")
    return [found, *words[1:]]


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """The library, compiled unless it was before. UserError, in one line, where that fails."""
    import torch  # noqa: F401  # first, so that its OpenMP runtime is the one that is shared

    chosen = compiler()
    sources = sorted(path for path in _FOLDER.iterdir() if path.suffix in (".c", ".h"))
    runtime = _openmp()
    parts = [*_FLAGS, *chosen, str(runtime), cpu_model(), _features(), *(path.read_text("utf-8") for path in sources)]
    key = hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]
    try:
        folder = home()
        found = next(filter(_whole, sorted(folder.glob(f"{key}-*.so"))), None)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            found = _build(chosen, runtime, folder, key)
        return ctypes.CDLL(str(found))
    except (OSError, RuntimeError):  # a home that cannot be written, where nothing may run, or that nobody has
        return _load_private(chosen, runtime, key)


def _load_private(chosen: list[str], runtime: Path | None, key: str) -> ctypes.CDLL:
    """Compiled for this process alone, in a folder of its own that is removed when the process ends."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="ridgepoint-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return ctypes.CDLL(str(_build(chosen, runtime, folder, key)))
    except OSError as error:
        raise UserError(f"the engine lean needs its compiled kernels, which failed: {error}") from error


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _whole(library: Path) -> bool:
    """Whether a library is what was compiled: running one that was cut off or changed ends the process, or lies."""
    try:
        return library.stem.partition("-")[2] == _digest(library)
    except OSError:
        return False


def _build(chosen: list[str], runtime: Path | None, folder: Path, key: str) -> Path:
    """Compile to a name of its own, then rename to one that tells the content: another process may do the same."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made, library = Path(scratch) / "native.o", Path(scratch) / "native.so"
        _call(chosen, [*_FLAGS, "-fopenmp", "-c", str(_FOLDER / "native.c")], made)
        link = ["-shared", str(made), "-lm"]
        try:
            # torch's own runtime where there is one: a second pool of threads would spin against the first.
            if runtime is None:
                raise UserError("no OpenMP runtime is loaded")
            _call(chosen, [*link, str(runtime), "-Wl,-z,defs"], library)
        except UserError:
            _call(chosen, [*link, "-fopenmp"], library)
        target = folder / f"{key}-{_digest(library)}.so"
        os.replace(library, target)
    return target


def _call(chosen: list[str], arguments: list[str], made: Path) -> None:
    done = subprocess.run([*chosen, *arguments, "-o", str(made)], capture_output=True, text=True, errors="replace")
    failed = f"the engine lean needs its kernels compiled, but {shlex.join(chosen)}"
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise UserError(f"{failed} failed: {' '.join(said.split()) or f'exit code {done.returncode}'}")
    if not made.is_file():
        raise UserError(f"{failed} made no {made.name}")


def _openmp() -> Path | None:
    """The libgomp that this process has loaded."""
    if not sys.platform.startswith("linux"):
        return None
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = (Path(line.split(maxsplit=5)[5]) for line in lines if "libgomp" in line)
    return next((path for path in paths if path.exists()), None)


def _features() -> str:
    """What the processor can do beyond its name: a virtual machine may move to another one."""
    if not sys.platform.startswith("linux"):
        return ""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
