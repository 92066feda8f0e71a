"""Which machine and software a number came from. Never imports torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from hardware.files import UserError

_PACKAGES = ("torch", "triton", "numpy")
_TIMING_KEYS = ("device", "cpu", "cores", "machine", "python", *_PACKAGES)  # not the kernel's patch level


def fingerprint(gpu: str | None = None) -> dict[str, Any]:
    """Device, processor, memory and software versions.

    `device` names the accelerator: `gpu` where given, else the current CUDA device if torch is already imported and has
    one, else the processor. Versions come from the installed packages' metadata (None: not installed).
    """
    cpu = cpu_model()
    return {
        "device": gpu or _cuda_name() or cpu,
        "cpu": cpu,
        "cores": core_count(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def fingerprint_key(found: dict[str, Any]) -> str:
    """Twelve hexadecimal digits of what decides timings: equal keys mean that times may be compared."""
    kept = {key: found.get(key) for key in _TIMING_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what decides timings and differs between two fingerprints."""
    return [key for key in _TIMING_KEYS if one.get(key) != other.get(key)]


def git_commit(path: str | os.PathLike[str]) -> str:
    """The commit checked out at `path`, with "-dirty" where tracked files were changed; "unknown" outside git."""
    try:
        folder = Path(path).resolve()
        folder = folder if folder.is_dir() else folder.parent
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def core_count() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Main memory of the machine. UserError where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        raise UserError("this system does not say how much memory it has") from error


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda_name() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name())


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
