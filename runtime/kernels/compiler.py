"""Compile kernels for GPUs that are not here, as the JIT would there, and read back what the compilers made of them.

A wrapper called with meta tensors tells its launches; Triton's own binder specialises them; ptxas and LLVM, which come
with Triton, do the rest. Compilers run in processes of their own: a crash costs one tiling. Torch and triton load late.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.kernels.problem import Problem
from runtime.kernels.registry import KERNELS, Kernel
from runtime.kernels.target import TARGETS, Target, Tiling, constants

if TYPE_CHECKING:
    from runtime.kernels.launch import Launch

USABLE = "usable"
# Of the matrix cores, with their shapes: in PTX, which is much quicker to read than a disassembly, and AMD's assembly.
MATRIX_INSTRUCTIONS = {
    "cuda": re.compile(r"^\s+(?:@%p\d+ )?((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.[\w.:]+)", re.MULTILINE),
    "hip": re.compile(r"^\s+v_(s?mfmac?_\w+)", re.MULTILINE),
}


@dataclass(frozen=True)
class Program:
    """One launch of a kernel, compiled.

    registers: 32-bit vector registers of a thread, AMD's accumulation registers included, of which `accumulators`.
    spilled_bytes: local or scratch memory of a thread, which only spilled registers use. shared_bytes: of a block.
    """

    function: str
    registers: int
    accumulators: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: Mapping[str, int]


@dataclass(frozen=True)
class Job:
    """One kernel with one tiling to compile for one target."""

    kernel: str
    target: str
    problem: Problem
    dtype: str
    tiling: Tiling


@dataclass(frozen=True)
class Compiled:
    """What came of a job. outcome: `usable`, or why the tiling is not: it spills, does not fit, or was refused."""

    job: Job
    programs: tuple[Program, ...]
    outcome: str

    @property
    def usable(self) -> bool:
        """Whether every launch of it fits its target and spills nothing."""
        return self.outcome == USABLE

    def plain(self) -> dict[str, Any]:
        """As JSON shows it."""
        job = self.job
        return {
            "kernel": job.kernel,
            "target": job.target,
            "problem": str(job.problem),
            "tokens": job.problem.tokens,
            "dtype": job.dtype,
            "tiling": dict(job.tiling),
            "programs": [dataclasses.asdict(program) for program in self.programs],
            "outcome": self.outcome,
        }


def triton_version() -> str:
    """Registers and spills differ between versions, so that a table names its own."""
    import triton

    return str(triton.__version__)


def launches(kernel: Kernel, problem: Problem, dtype: str, tiling: Tiling) -> list[Launch]:
    """What the kernel's wrapper would start; nothing is allocated or run."""
    import torch

    from runtime.kernels.launch import recording

    arguments = kernel.inputs(problem, getattr(torch, dtype), "meta")
    with recording() as found:
        kernel.triton()(**arguments, tiling=tiling)
    return found


def specialise(launch: Launch, target: Target) -> tuple[Any, Any, dict[str, Any]]:
    """Triton's source, target and options of a launch: constants, alignment and ranges as its JIT finds them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    architecture = target.name if target.backend == "hip" else int(target.name.removeprefix("sm_"))
    gpu = GPUTarget(target.backend, architecture, target.warp_size)
    backend, function = make_backend(gpu), launch.function
    bind = create_function_from_signature(function.signature, function.params, backend)
    given = {**launch.arguments, **launch.constants, **constants(launch.tiling), **target.options(launch.tiling)}
    bound, specialization, options = bind(**given)
    options, signature, constexprs, attributes = function._pack_args(backend, options, bound, specialization, options)
    return ASTSource(function, signature, constexprs, attributes), gpu, dict(options.__dict__)


def build(launch: Launch, target: Target) -> Program:
    """Compile one launch in this process. Raises whatever the compilers raise."""
    from triton.compiler import compile

    source, gpu, options = specialise(launch, target)
    compiled = compile(source, target=gpu, options=options)
    read = _read_amd if target.backend == "hip" else _read_nvidia
    return read(launch.function.__name__, compiled)


def _read_nvidia(name: str, compiled: Any) -> Program:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    spilled = usage["STACK"] + usage["LOCAL"]
    matrix = _counts(_short(name) for name in MATRIX_INSTRUCTIONS["cuda"].findall(compiled.asm["ptx"]))
    return Program(name, usage["REG"], 0, spilled, int(compiled.metadata.shared), matrix)


def _short(instruction: str) -> str:
    """wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 -> wgmma.m64n32k16."""
    parts = instruction.split(".")
    return ".".join([parts[0], *(part for part in parts if re.fullmatch(r"m\d+n\d+k\d+", part))])


def _read_amd(name: str, compiled: Any) -> Program:
    text = compiled.asm["amdgcn"]

    def read(key: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{key}:\s+(\d+)", text, re.MULTILINE)
        assert found is not None, f"no .{key} in the assembly"
        return int(found.group(1))

    return Program(
        name,
        read("vgpr_count"),
        read("agpr_count"),
        read("private_segment_fixed_size"),
        int(compiled.metadata.shared),
        _counts(MATRIX_INSTRUCTIONS["hip"].findall(text)),
    )


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def compile_one(job: Job) -> Compiled:
    """Compile a job in this process. An error of a compiler is an outcome."""
    target, programs = TARGETS[job.target], []
    try:
        for launch in launches(KERNELS[job.kernel], job.problem, job.dtype, job.tiling):
            programs.append(build(launch, target))
    except Exception as error:
        return Compiled(job, tuple(programs), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Compiled(job, tuple(programs), judge(programs, target))


def judge(programs: Sequence[Program], target: Target) -> str:
    """`usable`, or what keeps a kernel's launches from running well on the target."""
    shared = max((program.shared_bytes for program in programs), default=0)
    spilled = max((program.spilled_bytes for program in programs), default=0)
    if shared > target.shared_bytes:
        return f"needs {shared} B of shared memory, {target.name} has {target.shared_bytes}"
    return f"spills {spilled} B per thread" if spilled else USABLE


def _work(connection: Any) -> None:
    """A worker: jobs in, results out, until the other end closes. What compilers print goes nowhere."""
    os.environ.pop("TRITON_INTERPRET", None)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        while True:
            connection.send(compile_one(connection.recv()))
    except (EOFError, KeyboardInterrupt):
        pass


class Compilers:
    """Processes that compile. A context manager; the processes start with the first jobs and end with it."""

    def __init__(self, workers: int | None = None, seconds: float = 120.0) -> None:
        """seconds: the longest that one job may take."""
        self._count, self._seconds = workers or max(1, min(16, os.cpu_count() or 1)), seconds
        self._workers: list[_Worker] = []

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def compile(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Compiled]]:
        """Each job's place and what came of it, in the order in which they finish."""
        from multiprocessing.connection import wait

        waiting = list(enumerate(jobs))[::-1]
        idle, busy = self._workers, []  # type: list[_Worker], list[_Worker]
        while waiting or busy:
            while waiting and len(busy) < self._count:
                worker = idle.pop() if idle else _Worker()
                worker.start(*waiting.pop())
                busy.append(worker)
            first = min(worker.begun for worker in busy) + self._seconds - time.monotonic()
            wait([worker.connection for worker in busy], timeout=max(first, 0))
            for worker in list(busy):
                result = worker.result(self._seconds)
                if result is not None:
                    busy.remove(worker)
                    idle += [worker] if worker.alive else []
                    yield worker.place, result

    def usable(self, kernel: Kernel, target: Target, problem: Problem, dtype: str) -> list[Tiling]:
        """The kernel's tilings that fit the target and do not spill, in the kernel's own order."""
        tilings = kernel.tilings(target, problem)
        jobs = [Job(kernel.name, target.name, problem, dtype, tiling) for tiling in tilings]
        fitting = {place for place, result in self.compile(jobs) if result.usable}
        return [tiling for place, tiling in enumerate(tilings) if place in fitting]


class _Worker:
    """One process and the job it has."""

    def __init__(self) -> None:
        from multiprocessing import get_context

        context = get_context("spawn")  # a fork of a process with torch's threads may hang
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self.alive, self.begun, self.place = True, 0.0, 0

    def start(self, place: int, job: Job) -> None:
        self.place, self._job, self.begun = place, job, time.monotonic()
        self.connection.send(job)

    def result(self, seconds: float) -> Compiled | None:
        """What came of the job: None while it runs. Afterwards `alive` says whether the process can take another."""
        try:
            if self.connection.poll():
                found: Compiled = self.connection.recv()
                return found
        except (EOFError, OSError):
            self.stop()
            return Compiled(self._job, (), f"the compiler crashed (exit code {self._process.exitcode})")
        if time.monotonic() - self.begun < seconds:
            return None
        self.stop()
        return Compiled(self._job, (), f"the compiler took more than {seconds:g} s")

    def stop(self) -> None:
        self.alive = False
        self.connection.close()
        self._process.kill()
        self._process.join()


def usable(kernel: Kernel, target: Target, problem: Problem, dtype: str) -> list[Tiling]:
    """The kernel's tilings that fit the target and do not spill, in order. Starts and ends `Compilers` of its own."""
    with Compilers() as compilers:
        return compilers.usable(kernel, target, problem, dtype)


def jobs(
    kernels: Iterable[Kernel],
    targets: Iterable[Target],
    problems: Sequence[Problem],
    dtype: str,
    most: int | None = None,
) -> list[Job]:
    """Every kernel on every target and problem with its first `most` tilings (None: all)."""
    return [
        Job(kernel.name, target.name, problem, dtype, tiling)
        for kernel in kernels
        for target in targets
        for problem in problems
        for tiling in kernel.tilings(target, problem)[:most]
    ]


def compile_all(jobs: Sequence[Job], progress: Callable[[str, float], None] | None = None) -> list[Compiled]:
    """What came of each job, in their order. progress: what was done, and the share done."""
    found: dict[int, Compiled] = {}
    with Compilers() as compilers:
        for place, result in compilers.compile(jobs):
            found[place] = result
            if progress:
                progress(f"{result.job.kernel}, {result.job.target}, {result.job.problem}", len(found) / len(jobs))
    return [found[place] for place in range(len(jobs))]
