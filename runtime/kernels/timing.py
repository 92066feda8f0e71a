"""Time a kernel's tilings on a GPU, beside a copy in the same run: how much of the copy's bandwidth each reaches.

A call is timed as an engine runs it: many of them in one graph, over copies of the arguments that together exceed the
last-level cache, so that every call reads memory. Rounds go over all tilings and the copy in turn.
`python -m runtime.kernels.timing --kernel attention --batch 16 --slots 17` prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardware.files import UserError
from runtime.config import ModelConfig, require
from runtime.kernels.check import Subject, clone, require_gpu, require_triton, tensors
from runtime.kernels.problem import Problem
from runtime.kernels.registry import Kernel, kernel
from runtime.kernels.selection import device_target
from runtime.kernels.target import Tiling
from runtime.routing import Routes

CALLS = 24  # in a graph, at least
COPIED_BYTES = 1 << 29
INFINITY_CACHE_BYTES = 256 << 20  # AMD's last-level cache, which torch does not report
ROUTED = "chosen"  # the argument that holds each token's expert, in kernels that have one
Graph = Callable[[], None]  # replays


@dataclass(frozen=True)
class Traffic:
    """What one call must move and compute: every input and output once, of weights and caches what the call uses."""

    moved_bytes: int
    flops: int


@dataclass(frozen=True)
class Timed:
    """One tiling on one problem. seconds: of one call, a sample per round; none where `outcome` says why not.

    copy_bytes_per_second: median of the copies of the same rounds, bytes read and written.
    """

    kernel: str
    problem: str
    dtype: str
    tiling: Tiling
    traffic: Traffic
    seconds: tuple[float, ...] = ()
    copy_bytes_per_second: float = 0.0
    outcome: str = ""

    @property
    def median_seconds(self) -> float:
        """Median of the samples; infinite without any, so that sorting puts it last."""
        return statistics.median(self.seconds) if self.seconds else float("inf")

    @property
    def bytes_per_second(self) -> float:
        """Of what the call must move."""
        return self.traffic.moved_bytes / self.median_seconds

    @property
    def copy_share(self) -> float:
        """Its bandwidth over the copy's."""
        return self.bytes_per_second / self.copy_bytes_per_second if self.seconds else 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON shows it."""
        derived = ("median_seconds", "bytes_per_second", "copy_share") if self.seconds else ()
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def traffic(kernel: Kernel, arguments: dict[str, Any], returned: Any) -> Traffic:
    """Bytes and FLOPs of a call with these arguments. Intermediate results of several launches are not counted."""
    by_name = {"attention": _attention, "cca": _cca, "embed": _embed, "experts": _experts, "grouped_experts": _experts}
    partly = by_name.get(kernel.name)
    names, moved, flops = partly(arguments) if partly else ((), 0, 0)
    whole = {name: value for name, value in arguments.items() if name not in names}
    return Traffic(moved + _size(whole) + _size(returned), flops)


def _size(value: Any) -> int:
    return sum(tensor.nbytes for _, tensor in tensors(value))


def _attention(arguments: dict[str, Any]) -> tuple[tuple[str, ...], int, int]:
    keys, query, window, slots = (arguments[name] for name in ("keys", "query", "window", "slots"))
    cached = arguments["lengths"].long()
    if window is not None:  # the earliest slot looks back the farthest
        cached = cached.clamp(max=max(window - 1, 0))
    seen = int(cached.sum()) + len(cached) * slots
    row = keys.shape[2] * keys.shape[3] * keys.element_size()
    return ("keys", "values"), 2 * seen * row, 4 * slots * seen * query.shape[1] * query.shape[2]


def _cca(arguments: dict[str, Any]) -> tuple[tuple[str, ...], int, int]:
    keys, columns, taps = (arguments[name] for name in ("keys", "columns", "taps"))
    batch, tokens = len(arguments["lengths"]), len(arguments["projected"])
    written = 2 * tokens * keys.shape[2] * keys.shape[3]
    ring = batch * (taps.shape[1] - 1 + arguments["committed"]) * columns.shape[2]
    rotation = 2 * tokens * keys.shape[3]
    flops = 2 * tokens * arguments["weights"].convolution.numel()
    return ("keys", "values", "columns", "cos", "sin"), (written + ring + rotation) * keys.element_size(), flops


def _embed(arguments: dict[str, Any]) -> tuple[tuple[str, ...], int, int]:
    table = arguments["table"]
    return ("table",), len(arguments["tokens"]) * table.shape[1] * table.element_size(), 0


def _experts(arguments: dict[str, Any]) -> tuple[tuple[str, ...], int, int]:
    gate_up, down, chosen = (arguments[name] for name in ("gate_up", "down", "chosen"))
    real = chosen[chosen < len(down)]
    expert = gate_up[0].numel() + down[0].numel()
    hit = len(torch.unique(real))
    return ("gate_up", "down"), hit * expert * down.element_size(), 2 * len(real) * expert


@torch.inference_mode()
def time_tilings(
    kernel: Kernel,
    problem: Problem,
    dtype: str = "bfloat16",
    device: str = "cuda",
    tilings: Sequence[Tiling] | None = None,
    *,
    rounds: int = 10,
    deadline: float | None = None,
    progress: Callable[[str, float], None] | None = None,
    routes: Routes | None = None,
) -> list[Timed]:
    """Check every tiling against the reference, time those that pass, and return all, the fastest first.

    tilings: None for all of the device's target. deadline: on `time.monotonic`'s clock; tilings not captured by then
    are not timed. routes: see `Timer`. Every sequence has the whole context cached. UserError without triton or GPU.
    """
    require_triton()
    require(rounds >= 1, f"rounds >= 1 must hold, but got {rounds}")
    require_gpu(device)
    with torch.cuda.device(device):
        found = _timed(kernel, problem, dtype, device, tilings, rounds, deadline, progress, routes)
    return sorted(found, key=lambda timed: timed.median_seconds)


def _timed(
    kernel: Kernel,
    problem: Problem,
    dtype: str,
    device: str,
    tilings: Sequence[Tiling] | None,
    rounds: int,
    deadline: float | None,
    progress: Callable[[str, float], None] | None,
    routes: Routes | None = None,
) -> list[Timed]:
    tilings = tilings if tilings is not None else kernel.tilings(device_target(device), problem)
    subject = Subject(kernel, problem, dtype, device)
    timer = Timer(kernel, problem, dtype, device, routes)
    graphs: dict[int, Graph] = {}
    found: list[Timed] = []
    for place, tiling in enumerate(tilings):
        if progress:
            progress(f"{kernel.name}, {problem}, tiling {place + 1} of {len(tilings)}", place / len(tilings))
        late = deadline is not None and time.monotonic() > deadline
        checked = None if late else subject.check(tiling)
        outcome = "out of time" if checked is None else checked.outcome
        if checked is not None and not checked.passed:
            outcome = outcome or f"differs from the reference by {max(checked.errors.values()):.1e}"
        found.append(Timed(kernel.name, str(problem), dtype, dict(tiling), timer.traffic, outcome=outcome))
        if not outcome:
            graphs[place] = timer.graph(tiling)
    samples, copy = _rounds(graphs, timer.calls, rounds, device)
    for place, seconds in samples.items():
        found[place] = dataclasses.replace(found[place], seconds=tuple(seconds), copy_bytes_per_second=copy)
    return found


class Timer:
    """One kernel on one problem, over copies of its arguments; every sequence has the whole context cached.

    routes: of experts, int [rows, tokens], a row for each copy in turn, so that calls differ as the layers of a model
    do; None: those of the kernel's inputs. On a CPU, for kernels that run there, calls are timed by the clock, one
    after the other.
    """

    @torch.inference_mode()
    def __init__(self, kernel: Kernel, problem: Problem, dtype: str, device: str, routes: Routes | None = None) -> None:
        given = kernel.inputs(problem, getattr(torch, dtype), device)
        if isinstance(given.get("lengths"), Tensor):
            given["lengths"].fill_(problem.context)
        rows = routes if routes is not None and ROUTED in given else None
        _route(given, rows, 0)
        first = traffic(kernel, given, kernel.reference()(**clone(given)))
        self._gpu = torch.device(device).type == "cuda"
        count = _copies(given, first, device) if self._gpu else 1 if rows is None else min(len(rows), 2)
        self._copies = [given, *(clone(given) for _ in range(count - 1))]
        for place, arguments in enumerate(self._copies):
            _route(arguments, rows, place)
        self._run, self._pool = kernel.triton(), torch.cuda.graph_pool_handle() if self._gpu else None
        self.traffic = first if rows is None else _mean_traffic(kernel, self._copies, first)
        self.calls = len(self._copies) * (_cycles(len(self._copies)) if self._gpu else 1)

    @torch.inference_mode()
    def graph(self, tiling: Tiling) -> Graph:
        """`calls` calls with this tiling, to be replayed; the first call compiles."""
        if self._gpu:
            return _captured(self._run, self._copies, tiling, self._pool)

        @torch.inference_mode()
        def replay() -> None:
            for arguments in self._copies:
                self._run(**arguments, tiling=tiling)

        return replay

    def sample(self, graph: Graph) -> float:
        """Seconds of one call, from one replay."""
        if self._gpu:
            return _seconds(graph) / self.calls
        begun = time.perf_counter()
        graph()
        return (time.perf_counter() - begun) / self.calls


def _route(arguments: dict[str, Any], routes: Routes | None, place: int) -> None:
    if routes is not None:
        chosen = arguments[ROUTED]
        chosen.copy_(torch.from_numpy(routes[place % len(routes)]).to(chosen.dtype).view_as(chosen))


def _mean_traffic(kernel: Kernel, copies: list[dict[str, Any]], first: Traffic) -> Traffic:
    """Of calls whose routes differ; what is returned is of one size."""
    same = first.moved_bytes - traffic(kernel, copies[0], None).moved_bytes
    found = [traffic(kernel, arguments, None) for arguments in copies]
    moved, flops = (round(statistics.fmean(getattr(t, n) for t in found)) for n in ("moved_bytes", "flops"))
    return Traffic(moved + same, flops)


def _copies(given: dict[str, Any], needed: Traffic, device: str) -> int:
    """So many that what they move is twice the last-level cache, within a third of the free memory."""
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    cache = max(cache, INFINITY_CACHE_BYTES) if torch.version.hip else cache
    fitting = torch.cuda.mem_get_info(device)[0] // 3 // max(1, _size(given))
    return max(1, min(-(-2 * cache // needed.moved_bytes), fitting, 1024))


def _cycles(copies: int) -> int:
    return -(-CALLS // copies)


def _captured(run: Callable[..., Any], copies: list[dict[str, Any]], tiling: Tiling, pool: Any) -> Graph:
    """A graph of the calls. The first call compiles, and is made on the side as capturing asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(**copies[0], tiling=tiling)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(_cycles(len(copies))):
            for arguments in copies:
                run(**arguments, tiling=tiling)
    return graph.replay  # type: ignore[no-any-return]


def _rounds(graphs: dict[int, Graph], calls: int, rounds: int, device: str) -> tuple[dict[int, list[float]], float]:
    """Seconds of a call by graph, a sample per round, and the copy's median bytes per second."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples: dict[int, list[float]] = {place: [] for place in graphs}
    copied: list[float] = []
    for turn in range(rounds + 1):
        copy = 2 * COPIED_BYTES / _seconds(lambda: target.copy_(source))
        seconds = {place: _seconds(replay) / calls for place, replay in graphs.items()}
        if turn:  # the first round warms up
            copied.append(copy)
            for place, value in seconds.items():
                samples[place].append(value)
    return samples, statistics.median(copied)


def _seconds(run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def rows(timed: Sequence[Timed]) -> list[str]:
    """The table's lines."""
    lines = [f"{'us':>9} {'spread':>7} {'GB/s':>7} {'of copy':>7} {'TFLOP/s':>8}  tiling"]
    for one in timed:
        tiling = " ".join(f"{name}={value}" for name, value in one.tiling.items())
        if one.outcome:
            lines.append(f"{'-':>9} {'-':>7} {'-':>7} {'-':>7} {'-':>8}  {tiling}: {one.outcome}")
            continue
        median = one.median_seconds
        spread = (max(one.seconds) - min(one.seconds)) / 2 / median
        lines.append(
            f"{median * 1e6:9.2f} {spread:7.1%} {one.bytes_per_second / 1e9:7.0f} {one.copy_share:7.1%} "
            f"{one.traffic.flops / median / 1e12:8.1f}  {tiling}"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2: nothing can be timed here."""
    parser = argparse.ArgumentParser(prog="python -m runtime.kernels.timing", description=__doc__)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--slots", type=int, default=1, help="token slots of each")
    parser.add_argument("--context", type=int, default=1024, help="cached tokens of each")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    chosen = parser.parse_args(arguments)
    try:
        problem = Problem(ModelConfig(), chosen.batch, chosen.slots, chosen.context)
        timed = time_tilings(kernel(chosen.kernel), problem, chosen.dtype, chosen.device, rounds=chosen.rounds)
    except UserError as error:
        print(f"timing: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        print(json.dumps([one.plain() for one in timed], indent=2))
        return 0
    needed = timed[0].traffic
    copy = max(one.copy_bytes_per_second for one in timed)
    print(f"{chosen.kernel}, {problem}, {chosen.dtype}: {needed.moved_bytes:,} bytes and {needed.flops:,} FLOPs a call")
    print(f"a copy of {COPIED_BYTES >> 20} MiB moves {copy / 1e9:,.0f} GB/s")
    print("\n".join(rows(timed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
