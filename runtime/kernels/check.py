"""Whether a kernel does what its reference does: what it returns, and what it changes. Torch and triton load late.

`python -m runtime.kernels.check` tries every kernel on odd sizes: on a CPU in Triton's interpreter; on a GPU in
bfloat16 too, and at the full sizes of ZAYA1-8B, with every tiling if asked. Errors are relative norms,
||found - expected|| / ||expected||.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from hardware.files import UserError, known
from runtime.config import ModelConfig, require
from runtime.kernels.problem import ODD_PROBLEMS, Problem, full_problems
from runtime.kernels.registry import KERNELS, Kernel, kernel
from runtime.kernels.target import TARGETS, Tiling, constants

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
Tilings = Literal["default", "all"]


@dataclass(frozen=True)
class CheckResult:
    """One kernel with one tiling on one problem. errors: of every output and of every argument that changed, by name;
    without any, `outcome` says why: the tiling does not fit this device, or the error that was raised."""

    kernel: str
    problem: str
    dtype: str
    tiling: Tiling
    errors: Mapping[str, float]
    tolerance: float
    outcome: str = ""

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance; a tiling that does not fit is neither right nor wrong."""
        return self.unfit or (not self.outcome and all(e <= self.tolerance for e in self.errors.values()))

    @property
    def unfit(self) -> bool:
        """Whether the device refused the tiling before anything ran."""
        return self.outcome.startswith("does not fit")

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: _ordered(self.errors[name]), default="")
        shown = self.outcome or f"{self.errors[worst]:.1e} ({worst})"
        tiling = " ".join(f"{name}={value}" for name, value in self.tiling.items())
        state = "unfit" if self.unfit else "ok" if self.passed else "FAIL"
        return f"{state:5} {self.kernel:13} {self.dtype:8} {self.problem}: {shown}  [{tiling}]"


class Subject:
    """A kernel on one problem: its arguments and what the reference makes of them, shared by all tilings."""

    def __init__(self, kernel: Kernel, problem: Problem, dtype: str, device: Any, seed: int = 0) -> None:
        import torch

        self.kernel, self.problem, self.dtype = kernel, problem, dtype
        self._given = kernel.inputs(problem, getattr(torch, dtype), device, seed=seed)
        arguments = clone(self._given)
        self._expected = kernel.reference()(**arguments)
        self._expected_state = dict(tensors(arguments))

    def check(self, tiling: Tiling) -> CheckResult:
        """Run the kernel on a copy of the arguments. What it raises becomes the outcome: the next tiling may run."""
        errors: dict[str, float] = {}
        arguments, outcome = clone(self._given), ""
        try:
            found = self.kernel.triton()(**arguments, tiling=tiling)
            errors = self._errors(arguments, found)
        except Exception as error:  # whatever a compiler or a driver raises
            unfit = type(error).__name__ == "OutOfResources"
            outcome = f"{'does not fit' if unfit else type(error).__name__}: {' '.join(str(error).split())[:300]}"
        tolerance = TOLERANCES[self.dtype]
        return CheckResult(self.kernel.name, str(self.problem), self.dtype, dict(tiling), errors, tolerance, outcome)

    def _errors(self, arguments: dict[str, Any], found: Any) -> dict[str, float]:
        judged = self.kernel.errors(self._given, self._expected, found)
        names = self.kernel.output_names()
        expected, returned = (dict(tensors(_named(value, names))) for value in (self._expected, found))
        assert expected.keys() == returned.keys(), f"returns {sorted(returned)}, but the reference {sorted(expected)}"
        errors = {name: judged.get(name, relative_error(returned[name], expected[name])) for name in expected}
        before, after = dict(tensors(self._given)), dict(tensors(arguments))
        for name, kept in self._expected_state.items():
            if name.split(".")[0] in self.kernel.scratch:
                continue
            changed = _differs(kept, before[name]) | _differs(after[name], before[name])
            if bool(changed.any()):  # of a cache, only what was written: the rest would dilute the error
                errors[name] = judged.get(name, relative_error(after[name][changed], kept[changed]))
        return errors | judged


def check(
    kernel: Kernel, problem: Problem, dtype: str, device: Any, tiling: Tiling | None = None, seed: int = 0
) -> CheckResult:
    """One kernel on one problem with one tiling (None: the default of the device's target)."""
    from runtime.kernels.selection import default_tiling

    return Subject(kernel, problem, dtype, device, seed).check(tiling or default_tiling(kernel.name, device, problem))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, or of integers the share that differs; inf for another shape or type, and
    where a finite value was expected and none was found. Equal infinities agree."""
    import torch

    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return float((found != expected).float().mean()) if expected.numel() else 0.0
    same = (found == expected) | (found.isnan() & expected.isnan())
    zero = torch.zeros((), dtype=torch.float64, device=expected.device)
    difference = torch.where(same, zero, found.double() - expected.double()).norm()
    scale = torch.where(expected.isfinite(), expected.double(), zero).norm()
    error = float(difference / scale) if float(scale) > 0 else float("inf") * float(difference > 0)
    return 0.0 if bool(same.all()) else error if error == error else float("inf")


def clone(value: Any, storages: dict[int, Any] | None = None) -> Any:
    """A copy of nested arguments in which views still share what they shared, with the same strides."""
    import torch

    storages = {} if storages is None else storages
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage._cdata not in storages:  # the same for all views of one storage
            storages[storage._cdata] = storage.clone()
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(storages[storage._cdata], value.storage_offset(), value.shape, value.stride())
    if isinstance(value, dict):
        return {name: clone(part, storages) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [clone(part, storages) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and list(tensors(value)):
        fields = {f.name: clone(getattr(value, f.name), storages) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested arguments, with a dotted name each."""
    import torch

    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (tuple, list)):
        parts = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif dataclasses.is_dataclass(value):
        parts = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    for key, part in parts:
        yield from tensors(part, f"{name}.{key}" if name else str(key))


def _named(value: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(value, (tuple, list)):
        return {names[0] if names else "output": value}
    return dict(zip(names, value, strict=True)) if names else value


def _differs(a: Tensor, b: Tensor) -> Tensor:
    return (a != b) & ~((a != a) & (b != b))


def _ordered(error: float) -> float:
    return error if error == error else float("inf")


def plan(kernels: Iterable[Kernel], device: str, tilings: Tilings) -> list[tuple[Kernel, Problem, str, Tilings]]:
    """What there is to try: kernel, problem, dtype, tilings. Defaults come first, so that a deadline costs the rest."""
    kernels = list(kernels)
    if device == "cpu":  # the interpreter holds bfloat16 as integers
        dtypes = ("float32", "float16")
        return [(k, p, dtype, tilings) for k in kernels for p in ODD_PROBLEMS for dtype in dtypes]
    full = [(k, p, "bfloat16") for k in kernels for p in full_problems(ModelConfig())]
    odd = [(k, p, dtype) for dtype in ("bfloat16", "float32", "float16") for k in kernels for p in ODD_PROBLEMS]
    found: list[tuple[Kernel, Problem, str, Tilings]] = [(*cell, "default") for cell in full + odd]
    return found + [(*cell, "all") for cell in full if tilings == "all"]


def candidates(kernel: Kernel, problem: Problem, device: str, tilings: Tilings) -> list[Tiling]:
    """The default tilings, or all. The interpreter tries both vendors', of which it knows the block sizes only."""
    from runtime.kernels.selection import device_target

    targets = (TARGETS["sm_90"], TARGETS["gfx942"]) if device == "cpu" else (device_target(device),)
    found = [t for target in targets for t in kernel.tilings(target, problem)[: 1 if tilings == "default" else None]]
    return list({tuple(sorted(constants(t).items())): t for t in found}.values()) if device == "cpu" else found


def run(
    kernels: Iterable[Kernel],
    device: str,
    tilings: Tilings = "default",
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[CheckResult]:
    """Results as they come. An error of a kernel, of its inputs or of its reference is a result too."""
    cells = plan(kernels, device, tilings)
    for place, (k, problem, dtype, which) in enumerate(cells):
        if progress:
            progress(f"{k.name}, {dtype}, {problem}", place / len(cells))
        try:
            subject, tried = Subject(k, problem, dtype, device), candidates(k, problem, device, which)
        except Exception as error:
            outcome = f"nothing to compare: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            yield CheckResult(k.name, str(problem), dtype, {}, {}, TOLERANCES[dtype], outcome)
            continue
        for tiling in tried:
            yield subject.check(tiling)


def compile_ahead(
    kernels: Sequence[Kernel],
    device: str,
    tilings: Tilings,
    seconds: float = math.inf,
    progress: Callable[[str, float], None] | None = None,
) -> int:
    """Compile what `run` will start, side by side, into the cache where Triton's JIT looks; how much it was.

    Of a GPU that is no target of its own nothing is: the JIT would not find its neighbour's code. One kernel gets few
    cores, as benchmarks/gpu.py checks all of them at once.
    """
    from runtime.kernels.compiler import Compilers, Job
    from runtime.kernels.selection import device_target

    target, done = device_target(device), 0
    if target != TARGETS[target.name]:
        return 0
    jobs = [
        Job(k.name, target.name, problem, dtype, tiling)
        for k, problem, dtype, which in plan(kernels, device, tilings)
        for tiling in candidates(k, problem, device, which)
    ]
    begun = time.monotonic()
    with Compilers(workers=2 if len(kernels) == 1 else None) as compilers:
        for _, result in compilers.compile(jobs):
            done += 1
            if progress:
                progress(f"compile {result.job.kernel}, {result.job.dtype}, {result.job.problem}", done / len(jobs))
            if time.monotonic() - begun > seconds:
                break
    return done


def prepare(device: str) -> None:
    """Choose the interpreter for a CPU, before triton is imported; UserError for what is not there."""
    if device == "cpu":
        require("triton" not in sys.modules, "kernels are checked on the CPU in a process that has not loaded triton")
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        require_gpu(device, "cpu")
    require_triton()


def require_gpu(device: str, *others: str) -> None:
    """UserError for what names no GPU that is here. others: names that the caller takes besides."""
    if not re.fullmatch("cuda(:[0-9]+)?", device):
        raise known("device", device, (*others, "cuda", "cuda:N"))
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    require(index < count, f"no device {device}: torch sees {count} CUDA or ROCm devices here")


def require_triton() -> None:
    """UserError where triton is not installed; does not import it."""
    require(find_spec("triton") is not None, "the kernels need triton, which is not installed: pip install triton")


def report(
    names: Iterable[str],
    device: str,
    tilings: Tilings,
    as_json: bool,
    seconds: float | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> bool:
    """Print results as they come, or one JSON document at the end; whether all passed. seconds: start none after it."""
    wanted = [kernel(name) for name in names] or list(KERNELS.values())
    require(seconds is None or seconds > 0, f"seconds > 0 must hold, but got {seconds}")
    prepare(device)
    results: list[CheckResult] = []
    begun, complete = time.monotonic(), True
    if device != "cpu":
        ahead = compile_ahead(wanted, device, tilings, seconds / 3 if seconds else math.inf, progress)
        if not as_json:
            print(f"{ahead} compiled ahead in {time.monotonic() - begun:.0f} s", flush=True)
    for result in run(wanted, device, tilings, progress):
        results.append(result)
        if not as_json:
            print(result, flush=True)
        if seconds is not None and time.monotonic() - begun > seconds:
            complete = False
            break
    failed = [result for result in results if not result.passed]
    document = {
        "device": device,
        "complete": complete,
        "failed": len(failed),
        "results": [dataclasses.asdict(r) | {"passed": r.passed} for r in results],
    }
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        stopped = "" if complete else f", stopped after {seconds:g} s"
        print(f"{len(results)} checks on {device}, {len(failed)} failed{stopped}", flush=True)
    return not failed


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1: a kernel is wrong, 2: it cannot be tried here."""
    parser = argparse.ArgumentParser(prog="python -m runtime.kernels.check", description=__doc__)
    parser.add_argument("--kernel", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--device", default="cpu", help="cpu (the interpreter), cuda or cuda:N")
    parser.add_argument("--all-tilings", action="store_true", help="every tiling, not the default ones only")
    parser.add_argument("--seconds", type=float, help="start no further case after so long")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    options = parser.parse_args(arguments)
    tilings: Tilings = "all" if options.all_tilings else "default"
    try:
        return 0 if report(options.kernel, options.device, tilings, options.json, options.seconds) else 1
    except UserError as error:
        print(f"check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
