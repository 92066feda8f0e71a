"""The time of operators on a device: a bound at datasheet peaks, and an estimate at achieved rates with overhead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hardware.files import UserError
from hardware.profile import HardwareProfile
from perfmodel.costs import Call, Matmul, OperatorCost
from perfmodel.engine import EngineProfile, HostCosts
from perfmodel.execution import Executed
from perfmodel.kernels import collective
from perfmodel.kernels.call import Array, Attention, Collective, FusedMoe, Gemm, Parts
from perfmodel.kernels.elementwise import Elementwise
from perfmodel.kernels.library import Family, Library, load_library
from perfmodel.operators import engine_cost
from perfmodel.precision import arithmetic_dtype, attention_dtypes
from perfmodel.prediction import Bound
from perfmodel.probed import MatmulTimes, bandwidth_curve
from runtime.config import DTYPE_BYTES

BOUNDS: tuple[Bound, ...] = ("memory", "compute", "overhead")  # codes 0, 1, 2


@dataclass(frozen=True)
class Timing:
    """Seconds of one operator in a forward, as arrays that broadcast. The parts add up to `seconds`."""

    executed: Executed
    bound_seconds: Array
    parts: Parts
    family: Family | None  # of the kernel library; None: not from there
    clamped: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((), bool))  # rates made it beat its bound

    @property
    def name(self) -> str:
        """The operator's name."""
        return self.executed.cost.name

    @property
    def seconds(self) -> Array:
        """Calibrated estimate."""
        return self.parts.seconds


@dataclass(frozen=True)
class Timings:
    """Operators that run after each other. `kernels` are without the time in which the device waits for the host."""

    kernels: tuple[Timing, ...]
    host_seconds: tuple[Array, ...] | None = None  # by operator, where an eager host launches ahead of the device
    last: Timing | None = None  # what an engine adds

    @property
    def seconds(self) -> Array:
        """All of them: the device's time, or the host's where it is slower."""
        found = total([t.seconds for t in self.kernels])
        if self.host_seconds is not None:
            found = np.maximum(found, total(self.host_seconds))
        return found if self.last is None else found + self.last.seconds

    @property
    def bound_seconds(self) -> Array:
        """Roofline of all of them."""
        return total([t.bound_seconds for t in self.kernels])

    @property
    def clamped(self) -> npt.NDArray[np.bool_]:
        """Where the rates of an operator would have made it faster than its bound, which it then takes."""
        return any_of(t.clamped for t in self.kernels)

    def followed_by(self, last: Timing) -> Timings:
        """These, then what neither the device nor its host can hide."""
        return replace(self, last=last)

    @property
    def operators(self) -> list[Timing]:
        """Every operator with its share of the waiting, which is in proportion to what the host does for it."""
        after = [] if self.last is None else [self.last]
        if self.host_seconds is None:
            return [*self.kernels, *after]
        hosted = total(self.host_seconds)
        waiting = np.maximum(hosted - total([t.seconds for t in self.kernels]), 0.0)
        share = waiting / np.maximum(hosted, np.finfo(float).tiny)
        waited = [
            replace(t, parts=t.parts._replace(overhead=t.parts.overhead + host * share))
            for t, host in zip(self.kernels, self.host_seconds, strict=True)
        ]
        return [*waited, *after]


def total(arrays: Iterable[Array]) -> Array:
    """Their sum, the small ones first: over a grid only few of them have the whole's shape."""
    return sum(sorted(arrays, key=np.size), np.zeros(()))


def any_of(arrays: Iterable[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
    """Where one of them is true; they broadcast."""
    found = np.zeros((), bool)
    for array in arrays:
        found = found | array
    return found


class Device:
    """The rates of one hardware profile for one dtype and thread count, ready for arrays.

    library: the kernels that estimates are made of; None for a CPU and for a device whose matmuls were probed.
    Raises UserError for a dtype without a peak, and for a thread count that a probed profile has no curves for.
    """

    def __init__(self, hardware: HardwareProfile, dtype: str, threads: int | None = None) -> None:
        peaks = {str(name): rate for name, rate in hardware.peak_flops_per_second.items()}
        if dtype not in peaks or dtype not in DTYPE_BYTES:
            usable = ", ".join(sorted(set(peaks) & set(DTYPE_BYTES)))
            why = "is for weights and caches, not for activations and sums" if dtype in peaks else "has no peak"
            raise UserError(f"{dtype!r} {why} on {hardware.name}, whose dtypes are {usable}")
        self.hardware, self.dtype = hardware, dtype
        self.peak_flops = peaks[dtype]
        achieved = {str(name): rate for name, rate in hardware.achieved_flops_per_second.items()}
        self.achieved_flops = achieved.get(dtype, self.peak_flops)
        curves = hardware.curves(threads) if hardware.measured else None
        self.dispatch_seconds = curves.elementwise_seconds if curves else hardware.launch_seconds
        self._bandwidth = bandwidth_curve(curves) if curves else None
        self._matmuls = MatmulTimes(hardware, curves, dtype) if curves else None
        if self._matmuls is not None and not self._matmuls.shapes:
            self._matmuls = None
        self.library: Library | None = load_library() if hardware.kind == "gpu" and not hardware.measured else None
        self._peaks = peaks
        self._dtypes: dict[tuple[str, str], str] = {}
        self._levels = [  # bytes that faster levels hold, and the peak; free without one
            (sum(faster.capacity_bytes for faster in hardware.memory[:i]), level.peak_bandwidth_bytes_per_second)
            for i, level in enumerate(hardware.memory)
        ]

    def peak_of(self, weights: str, activations: str) -> float:
        """Datasheet FLOPs per second of a matmul of these dtypes."""
        key = weights, activations
        if key not in self._dtypes:
            self._dtypes[key] = arithmetic_dtype(self.hardware, weights, activations)
        return self._peaks[self._dtypes[key]]

    def peak_of_cost(self, cost: OperatorCost) -> float:
        """The same of what an operator multiplies; of no one dtype's where it multiplies nothing."""
        if cost.dtypes is None:
            return self.peak_flops
        if cost.name == "attention":
            return self.peak_of(*attention_dtypes(self.hardware, cost.dtypes[0]))
        return self.peak_of(*cost.dtypes)

    def least_seconds_per_byte(self, working_set_bytes: Array, times: float = 1.0) -> Array:
        """Datasheet seconds of a byte of a working set that is read again and again, of which caches may keep a part.

        A level must bring what all faster ones together cannot hold: the slowest of them binds. They may hold as much
        `times` over. A level without a figure is free.
        """
        size = np.maximum(working_set_bytes, 1.0)
        found = np.zeros(())
        for inside, peak in self._levels:
            if peak is not None:
                found = np.maximum(found, np.maximum(1 - times * inside / size, 0.0) / peak)
        return found

    def bandwidth(self, working_set_bytes: Array) -> Array:
        """Achieved bandwidth for a working set that is read again and again."""
        if self._bandwidth is not None:
            return np.exp(np.interp(np.log(np.maximum(working_set_bytes, 1.0)), *self._bandwidth))
        rates: list[float] = []
        slower = np.nan
        for level in reversed(self.hardware.memory):  # a level without a figure is no faster than the one behind it
            slower = level.achieved_bandwidth_bytes_per_second or level.peak_bandwidth_bytes_per_second or slower
            rates.insert(0, slower)
        return self._by_level(working_set_bytes, rates)

    @property
    def largest_cache(self) -> float:
        """Bytes of the last level before main memory; 0 without one."""
        return self.hardware.memory[-2].capacity_bytes if len(self.hardware.memory) > 1 else 0.0

    @property
    def ridge_point(self) -> float:
        """FLOPs per byte of main memory at which memory-bound turns into compute-bound, at datasheet peaks."""
        bandwidth = self.hardware.main_memory.peak_bandwidth_bytes_per_second
        assert bandwidth is not None  # a profile without it is refused when it is read
        return self.peak_flops / bandwidth

    def _by_level(self, working_set_bytes: Array, rates: Sequence[float]) -> Array:
        capacities = [level.capacity_bytes for level in self.hardware.memory[:-1]]
        return np.asarray(rates)[np.searchsorted(capacities, working_set_bytes)]

    def matmul_seconds(self, matmul: Matmul, weight_bytes_each: float, working_set_bytes: Array) -> Array:
        """Achieved seconds of the products, launches excluded: by the probed curves, else by the best rate."""
        memory = matmul.count * weight_bytes_each / self.bandwidth(working_set_bytes)
        if self._matmuls is None:
            return np.maximum(matmul.flops / self.achieved_flops, memory)
        return np.maximum(matmul.count * self._matmuls.seconds(matmul.rows, matmul.inner, matmul.outer), memory)


LEFT_IN_CACHES = 4  # times their size: two kernels in turn find an end of their input and leave one of their output


def bound_seconds(cost: OperatorCost, device: Device, per_weight_byte: Array) -> Array:
    """Roofline at datasheet peaks: no kernels that read the same weights and cache can be faster.

    The caches may keep what they hold from one forward to the next, of all weights (`per_weight_byte`: the least
    seconds of each) as well as of an operator's own cache; of its activations, what its kernels leave there for each
    other. So the bound has no jump where something outgrows a cache.
    """
    moved = cost.weight_bytes * per_weight_byte + cost.kv_bytes * device.least_seconds_per_byte(cost.kv_bytes)
    each = device.least_seconds_per_byte(cost.activation_set_bytes, LEFT_IN_CACHES)
    moved = moved + cost.activation_bytes * each
    return moved if cost.dtypes is None else np.maximum(cost.least_flops / device.peak_of_cost(cost), moved)


_ROUNDING = 1e-9


def time_operators(operators: Sequence[Executed], device: Device, engine: EngineProfile) -> Timings:
    """Time operators that run after each other in one forward.

    synchronous: host + kernels of each operator. graph: kernels + the gap between graph nodes. eager: the kernels, or
    the host where it is slower: max(sum of kernels, sum of host), the waiting shared out by launches. None is below
    its bound.
    """
    dispatch = engine.scale_of("dispatch")
    costs = engine.host_costs(device.hardware)
    weight_bytes = total([op.cost.weight_bytes for op in operators])
    per_weight_byte = device.least_seconds_per_byte(weight_bytes)
    stream_bytes = weight_bytes + total([op.cost.kv_bytes for op in operators])
    cold = stream_bytes > device.largest_cache
    found = []
    for op in operators:
        family: Family | None = None
        if device.library is not None:
            family, work = _from_library(op, device, device.library, engine, costs, cold)
            memory, compute, extra = work
            extra = extra * dispatch if engine.host == "graph" else extra
        else:
            memory, compute = _work(op, device, engine, stream_bytes)
            node = op.launches * device.hardware.graph_node_seconds
            host = op.host_units * device.dispatch_seconds * dispatch
            extra = {"synchronous": host, "graph": node * dispatch, "eager": node}[engine.host]
        bound = bound_seconds(op.cost, device, per_weight_byte)
        for count, call in op.cost.calls:
            if isinstance(call, Collective):
                bound = bound + count * collective.bound(call, device.hardware)
        # Below the bound a fitted rate exceeds the datasheet's: the estimate is then the bound.
        missing = np.maximum(bound - (memory + compute + extra), 0.0)
        clamped = np.zeros((), bool)
        if missing.any():
            clamped = missing > _ROUNDING * bound
            computing = op.cost.least_flops / device.peak_of_cost(op.cost) >= bound
            memory, compute = memory + np.where(computing, 0.0, missing), compute + np.where(computing, missing, 0.0)
        found.append(Timing(op, bound, Parts(memory, compute, extra), family, clamped))
    if engine.host != "eager":
        return Timings(tuple(found))
    return Timings(tuple(found), tuple(op.host_units * device.dispatch_seconds * dispatch for op in operators))


def engine_timing(seconds: Array) -> Timing:
    """What an engine adds to a forward or a step beside its kernels."""
    cost, zero = engine_cost(), np.zeros(())
    return Timing(Executed(cost, (), zero, zero, zero, zero), zero, Parts(zero, zero, seconds), None)


_FAMILY: dict[type, Family] = {Attention: "attention", FusedMoe: "moe", Collective: "collective"}
_KERNELS_OF_CALL: dict[type, int] = {Attention: 1, FusedMoe: 2, Collective: 1}  # what an engine's launches count


def _from_library(
    op: Executed,
    device: Device,
    library: Library,
    engine: EngineProfile,
    costs: HostCosts,
    cold: npt.NDArray[np.bool_],
) -> tuple[Family, Parts]:
    """An operator as calls of the kernel library; what the engine launches beyond them only moves activations.

    An engine that launches fewer kernels than there are calls has fused them, and pays their overhead as often as it
    launches.
    """
    zero = np.zeros(())
    memory, compute, overhead, called = zero, zero, zero, zero
    family: Family = "elementwise"
    moved, lives = op.moved_bytes, op.cost.activation_set_bytes
    if op.calls:
        for count, call in op.calls:
            family = _FAMILY[type(call)]
            parts = _call(library, call, device.hardware)
            memory, compute = memory + count * parts.memory, compute + count * parts.compute
            overhead = overhead + count * parts.overhead
            called = called + count * _KERNELS_OF_CALL[type(call)]
    elif op.matmuls and op.cost.dtypes and op.cost.name != "cca":
        family = "gemm"
        for m in op.matmuls:
            rows = np.maximum(m.rows, 1.0)
            # The kernel before the matmul narrows activations, where an engine replays graphs of fused kernels.
            gemm = Gemm(rows, m.outer, m.inner, *op.cost.dtypes, quantise=engine.host != "graph")
            count = np.where(m.rows > 0, m.count, 0.0)
            parts = _by_temperature(library, gemm, device.hardware, cold)
            memory, compute = memory + count * parts.memory, compute + count * parts.compute
            overhead = overhead + count * parts.overhead
            called = called + count
    else:
        streamed = op.weight_bytes + op.cost.kv_bytes
        moved, lives = moved + streamed, lives + streamed
        compute = op.cost.flops / device.achieved_flops
    factor = costs.factor(family)
    rate_of_memory, rate_of_compute = _scales(family, engine)
    fused = np.minimum(op.launches / np.maximum(called, 1.0), 1.0)
    memory, compute = memory * (factor / rate_of_memory), compute * (factor / rate_of_compute)
    overhead = overhead * (factor * fused)
    rest = Elementwise(moved, np.maximum(op.launches - called, 0.0), lives)
    alone = library.elementwise.time(rest, device.hardware)
    apart = costs.factor("elementwise")
    memory = memory + alone.memory * (apart / engine.scale_of("activations"))
    return family, Parts(memory, compute, overhead + alone.overhead * apart)


def _by_temperature(library: Library, gemm: Gemm, hardware: HardwareProfile, cold: npt.NDArray[np.bool_]) -> Parts:
    """A linear layer whose weights are cold at some points of a grid and stay in a cache at the others."""
    if cold.all() or not cold.any():
        return library.gemm.time(replace(gemm, cold=bool(cold.all())), hardware)
    from_memory, from_cache = (library.gemm.time(replace(gemm, cold=c), hardware) for c in (True, False))
    return Parts(*(np.where(cold, one, other) for one, other in zip(from_memory, from_cache, strict=True)))


def _call(library: Library, call: Call, hardware: HardwareProfile) -> Parts:
    if isinstance(call, Attention):
        return library.attention.time(call, hardware)
    if isinstance(call, FusedMoe):
        return library.moe.time(call, hardware)
    return library.collective.time(call, hardware)


def _scales(family: Family, engine: EngineProfile) -> tuple[float, float]:
    """What calibration multiplies a family's rates with, of memory and of arithmetic."""
    if family == "attention":
        return engine.scale_of("cache"), engine.scale_of("attention")
    if family in ("gemm", "moe"):
        return engine.scale_of("matmul"), engine.scale_of("matmul")
    return 1.0, 1.0


def _work(op: Executed, device: Device, engine: EngineProfile, stream_bytes: Array) -> tuple[Array, Array]:
    """Seconds of an operator's kernels, as (memory, compute)."""
    cost, overlap = op.cost, engine.overlap
    streamed = op.weight_bytes / device.bandwidth(stream_bytes)
    moved = op.moved_bytes / (device.bandwidth(cost.activation_set_bytes) * engine.scale_of("activations"))
    cached = cost.kv_bytes / device.bandwidth(stream_bytes)
    if not op.matmuls:  # attention, or an operator that only moves
        arithmetic = cost.flops / (device.achieved_flops * engine.scale_of("attention"))
        memory = streamed + moved + cached / engine.scale_of("cache")
        return _hide(memory, arithmetic) if overlap else (memory, arithmetic)
    rate = engine.scale_of("matmul")
    if engine.row_tile:
        flops = sum((m.count * 2.0 * m.inner * m.outer * _tiled(m.rows, engine.row_tile) for m in op.matmuls), 0.0)
        matmul = np.maximum(flops / (device.achieved_flops * rate), streamed / engine.scale_of("weights"))
    else:
        matmul = np.zeros(np.shape(cost.flops))
        for product in op.matmuls:
            each = product.inner * product.outer * DTYPE_BYTES[device.dtype]
            matmul = matmul + device.matmul_seconds(product, each, stream_bytes)
        matmul = np.maximum(matmul, streamed) / rate
    waits = streamed > cost.flops / device.peak_flops  # a matmul that waits for its weights counts as memory
    if overlap:
        memory = streamed + moved + cached
        return _hide(np.where(waits, np.maximum(memory, matmul), memory), np.where(waits, 0.0, matmul))
    return moved + cached + np.where(waits, matmul, 0.0), np.where(waits, 0.0, matmul)


def _tiled(rows: Array, tile: int) -> Array:
    """Rows that a product of so many takes the time of: one runs alone; two and more take a tile at least.

    Between one and two, as an average over experts can be, it is the mix of both.
    """
    return np.maximum(rows, np.minimum(tile, 1 + (tile - 1) * (rows - 1)))


def _hide(memory: Array, arithmetic: Array) -> tuple[Array, Array]:
    """The larger of the two, alone."""
    return np.where(memory >= arithmetic, memory, 0.0), np.where(memory >= arithmetic, 0.0, arithmetic)
