"""Where a kernel's tilings are checked and timed: in a process that a broken one may take with it.

Needs torch, and triton for Triton's kernels, but no search library. Both load when a runner is made.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

from autotune.objective import StageFailure
from autotune.tiling_model import predicted_seconds
from autotune.tiling_results import TilingSubject
from hardware.files import UserError, known, plain
from hardware.fingerprint import fingerprint
from hardware.profile import HardwareProfile
from runtime.config import DecodingConfig, ModelConfig, require
from runtime.kernels.compiler import Compiled, Program, judge
from runtime.kernels.problem import Problem
from runtime.kernels.registry import Kernel
from runtime.kernels.target import TARGETS
from runtime.kernels.target import target as target_named

REGISTRY = "runtime.kernels.registry:KERNELS"
ROUNDS = 10
_GRAPHS = 4  # kept: those of a comparison
# What compilers raise, Triton's and its interpreter's among them, by name: neither need be installed.
_COMPILERS = ("CompilationError", "CompileTimeAssertionFailure", "UnsupportedLanguageConstruct", "PTXASError")


class Bucket(NamedTuple):
    """Forwards that share a tiling: so many sequences with so many slots each."""

    batch: int
    slots: int

    @property
    def tokens(self) -> int:
        """By which the runtime finds the tiling."""
        return self.batch * self.slots


def buckets(batches: Iterable[int], decodings: Iterable[DecodingConfig]) -> list[Bucket]:
    """The forwards that these samplers send at these batches, each token count once, the smallest first.

    A step has one or two kinds of forward, of equal slots: a token, [anchor, masks] and its verification, or verified
    slots with a block per level. A token count that several make is timed as the one with the most slots, whose
    attention is the dearest. Prefills, of any length, keep the default tiling unless a bucket holds them.
    """
    found: dict[int, Bucket] = {}
    for batch in batches:
        require(batch >= 1, f"batch >= 1 must hold, but got {batch}")
        for decoding in decodings:
            bucket = Bucket(batch, decoding.slots)
            held = found.get(bucket.tokens)
            found[bucket.tokens] = bucket if held is None else max(held, bucket, key=lambda b: b.slots)
    return [found[tokens] for tokens in sorted(found)]


@dataclass(frozen=True)
class TilingWork:
    """A kernel at one bucket of one model on one device: what a process needs to check and time its tilings.

    routing: of experts, see `runtime.route_recording.route_rows`; it must be said for a kernel that has routes.
    decoding: whose slots they are, to record its routes; None: see `route_rows`.
    rounds: samples of a tiling. registry: `module:NAME` of the kernels by name.
    """

    kernel: str
    model: str
    config: ModelConfig
    dtype: str = "bfloat16"
    device: str = "cuda"
    batch: int = 1
    slots: int = 1
    context: int = 1024
    routing: str = ""
    decoding: DecodingConfig | None = None
    rounds: int = ROUNDS
    registry: str = REGISTRY
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"rounds >= 1 must hold, but got {self.rounds}")
        self.problem  # noqa: B018  # refuses what is no problem

    @property
    def problem(self) -> Problem:
        """What is timed: causal slots, over a full context."""
        return Problem(self.config, self.batch, self.slots, self.context)

    @property
    def config_hash(self) -> str:
        """Of all sizes of the model."""
        return hashlib.sha256(json.dumps(plain(self.config), sort_keys=True).encode()).hexdigest()[:12]

    def find_kernel(self) -> Kernel:
        """The kernel of that name in the registry; UserError names the known ones."""
        module, _, name = self.registry.partition(":")
        kernels: Mapping[str, Kernel] = getattr(import_module(module), name)
        if self.kernel not in kernels:
            raise known("kernel", self.kernel, kernels)
        return kernels[self.kernel]

    def __call__(self) -> TilingRunner:
        """The runner, in this process."""
        return TilingRunner(self)


@dataclass(frozen=True)
class Described:
    """What the device's process knows of the work before anything runs.

    target: name of the architecture to compile for; None where none of ours is exactly it, or on a CPU.
    grids: of every tiling, the programs of each launch; empty where that is not known.
    moved_bytes, flops: what a call must move and compute (`runtime.kernels.timing.Traffic`).
    loads: of routes, each forward's tokens of every expert, the skip expert's last.
    """

    device: dict[str, Any]
    triton: str | None
    target: str | None
    tilings: tuple[dict[str, int], ...]
    grids: tuple[tuple[int, ...], ...]
    moved_bytes: int
    flops: int
    routing: str
    loads: tuple[tuple[int, ...], ...] = field(default=())


def subject_of(work: TilingWork, described: Described) -> TilingSubject:
    """What the times of this work belong to on the device that was described."""
    return TilingSubject(
        work.kernel,
        work.model,
        work.config_hash,
        described.device,
        work.dtype,
        work.batch,
        work.slots,
        work.context,
        described.routing,
        described.triton,
        experts=work.config.num_experts,
        expert_width=work.config.moe_intermediate_size,
    )


def compiled_facts(compiled: Compiled) -> dict[str, Any]:
    """What came of compiling, to be stored: an outcome (`correct`: it may run), why, and registers and memory."""
    outcome = "correct"
    if not compiled.usable:
        limits = judge(compiled.programs, target_named(compiled.job.target))
        outcome = "infeasible" if compiled.programs and limits == compiled.outcome else "compile"
    return {
        "outcome": outcome,
        "reason": "" if compiled.usable else compiled.outcome,
        "programs": [plain(program) for program in compiled.programs],
    }


def prediction_of(
    work: TilingWork,
    described: Described,
    place: int,
    hardware: HardwareProfile | None,
    programs: Sequence[Program] = (),
) -> float | None:
    """Predicted seconds of the tiling at this place; None without a profile, or where its launches are not known.

    programs: what the compiler made of its launches; () where it was not asked.
    """
    if hardware is None or not described.grids:
        return None
    return predicted_seconds(
        work.kernel,
        work.problem,
        work.dtype,
        described.tilings[place],
        hardware,
        grids=described.grids[place],
        moved_bytes=described.moved_bytes,
        flops=described.flops,
        loads=described.loads,
        programs=programs,
    )


def odd_problems(problem: Problem) -> list[Problem]:
    """Others of the same model that the bucket's tiling will serve: fewer tokens, odd counts, lengths and layouts.

    One has a token more than the bucket: engines that look for the nearest size use a tiling beyond its own.
    """
    config, batch, slots = problem.config, problem.batch, problem.slots
    length = max(1, problem.context - 3)
    found = [Problem(config, 1, 1, 11), Problem(config, problem.tokens + 1, 1, min(length, 37))]
    if batch > 1:
        found.append(Problem(config, batch - 1, slots, length))
    if problem.tokens > 3:
        found.append(Problem(config, max(1, (batch * 2 // 3) | 1), max(1, slots - 1), min(length, 101)))
    if slots > 1:
        found.append(Problem(config, 1, slots, min(length, 19), "draft"))
    return [p for place, p in enumerate(found) if p != problem and p not in found[:place]]


class TilingRunner:
    """Checks and times the tilings of one kernel at one bucket. Made in the process that uses the device."""

    def __init__(self, work: TilingWork) -> None:
        import torch

        from runtime.kernels.check import require_gpu

        if work.device != "cpu":
            require_gpu(work.device, "cpu")
            torch.cuda.set_device(torch.device(work.device).index or 0)  # where Triton launches
        self.work, self.kernel, self.problem = work, work.find_kernel(), work.problem
        self._graphs: OrderedDict[str, Callable[[], None]] = OrderedDict()
        self._turn = 0

    def describe(self) -> Described:
        """See `Described`."""
        import torch

        from runtime.kernels.compiler import triton_version
        from runtime.kernels.selection import device_target
        from runtime.kernels.timing import ROUTED

        gpu = torch.device(self.work.device).type == "cuda"
        target = device_target(self.work.device)
        tilings = tuple(dict(t) for t in self.kernel.tilings(target, self.problem))
        routed = ROUTED in self.kernel.inputs(self.problem, torch.float32, "meta")
        rows = self._routes.rows if routed and self._routes else ()
        classes = self.work.config.num_experts + 1
        exact = gpu and target == TARGETS[target.name]
        return Described(
            fingerprint(torch.cuda.get_device_name(self.work.device) if gpu else None),
            triton_version() if gpu else None,
            target.name if exact else None,
            tilings,
            tuple(self._grid(tiling) for tiling in tilings) if gpu else (),
            self._timer.traffic.moved_bytes,
            self._timer.traffic.flops,
            self._routes.source if routed and self._routes else "",
            tuple(tuple(int((row == e).sum()) for e in range(classes)) for row in rows),
        )

    def _grid(self, tiling: dict[str, int]) -> tuple[int, ...]:
        """Programs of each launch; none for a tiling that the wrapper refuses."""
        from math import prod

        from runtime.kernels.compiler import launches

        try:
            return tuple(prod(launch.grid) for launch in launches(self.kernel, self.problem, self.work.dtype, tiling))
        except Exception:  # whatever a wrapper raises: its own trial will tell
            return ()

    @cached_property
    def _routes(self) -> Any:
        """Routes for a kernel that has them; UserError where the work does not say whose."""
        import torch

        from runtime.kernels.timing import ROUTED
        from runtime.route_recording import route_rows

        if ROUTED not in self.kernel.inputs(self.problem, torch.float32, "meta"):
            return None
        work = self.work
        require(
            work.routing != "",
            f"routing must be said for {work.kernel}, whose times depend on it: recorded:MODEL, measured:FILE or "
            "uniform",
        )
        return route_rows(
            work.routing,
            work.config,
            work.batch,
            work.slots,
            decoding=work.decoding,
            device=work.device,
            seed=work.seed,
        )

    @cached_property
    def _timer(self) -> Any:
        from runtime.kernels.timing import Timer

        routes = None if self._routes is None else self._routes.rows
        return Timer(self.kernel, self.problem, self.work.dtype, self.work.device, routes)

    @cached_property
    def _subjects(self) -> list[Any]:
        """The bucket's problem first, then the odd ones, with what the reference makes of them."""
        from runtime.kernels.check import Subject

        problems = (self.problem, *odd_problems(self.problem))
        return [Subject(self.kernel, problem, self.work.dtype, self.work.device) for problem in problems]

    def check(self, tiling: Mapping[str, int]) -> dict[str, float]:
        """Worst relative error of each output, over the bucket's problem and odd ones.

        StageFailure: "incorrect" beyond the tolerance, with the errors; "compile", or "infeasible" where it does not
        fit. RuntimeError where it does not run: whoever called knows which errors spoil this process.
        """
        worst: dict[str, float] = {}
        for subject in self._subjects:
            result = subject.check(tiling)
            if result.outcome:
                reason = f"{result.problem}: {result.outcome}"
                if result.unfit:
                    raise StageFailure("infeasible", reason)
                if result.outcome.startswith(_COMPILERS):
                    raise StageFailure("compile", reason)
                raise RuntimeError(reason)
            for name, error in result.errors.items():
                worst[name] = max(worst.get(name, 0.0), error if error == error else float("inf"))
            if not result.passed:
                name = max(worst, key=lambda n: worst[n])
                reason = f"{result.problem}: {name} differs from the reference by {worst[name]:.1e}"
                raise StageFailure("incorrect", reason, {"errors": {n: min(e, 1e300) for n, e in worst.items()}})
        return worst

    def time(self, tiling: Mapping[str, int]) -> tuple[float, ...]:
        """Seconds of one call, a sample per round after one that warms up."""
        graph = self._graph(tiling)
        samples = [self._timer.sample(graph) for _ in range(self.work.rounds + 1)]
        return tuple(samples[1:])

    def pair(self, default: Mapping[str, int], tiling: Mapping[str, int]) -> tuple[float, float]:
        """Seconds of a call with each, in one alternating round: every second one runs the default last."""
        graphs = [self._graph(default), self._graph(tiling)]
        order = (0, 1) if self._turn % 2 == 0 else (1, 0)
        self._turn += 1
        seconds = {place: self._timer.sample(graphs[place]) for place in order}
        return seconds[0], seconds[1]

    def _graph(self, tiling: Mapping[str, int]) -> Callable[[], None]:
        """Captured once, and warm."""
        key = json.dumps(dict(tiling), sort_keys=True)
        if key not in self._graphs:
            graph = self._timer.graph(tiling)
            graph()
            self._graphs[key] = graph
            while len(self._graphs) > _GRAPHS:
                self._graphs.popitem(last=False)
        return self._graphs[key]

    def close(self) -> None:
        """The process ends with its memory."""


def refuse_cpu(device: str) -> None:
    """UserError for tilings of a CPU: Triton's interpreter says nothing about speed."""
    if device == "cpu":
        raise UserError("tilings are timed on a GPU: on a CPU Triton's kernels are only interpreted")


def works_of(
    kernels: Sequence[str],
    model: str,
    config: ModelConfig,
    wanted: Sequence[Bucket],
    decodings: Sequence[DecodingConfig] = (),
    **settings: Any,
) -> list[TilingWork]:
    """The work of every kernel at every bucket. decodings: to record the routes of the ones whose slots they are."""
    senders = {decoding.slots: decoding for decoding in decodings}
    return [
        TilingWork(kernel, model, config, batch=b.batch, slots=b.slots, decoding=senders.get(b.slots), **settings)
        for b in wanted
        for kernel in kernels
    ]
