"""What a model and its caches take of a device's memory, and what would fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hardware.files import UserError
from hardware.profile import HardwareProfile
from perfmodel.kernels.call import Array
from perfmodel.precision import stored_bytes

if TYPE_CHECKING:
    from perfmodel.decoding import Setting

MEMORY_SHARE = 0.9  # of a device's memory, for weights and caches: the default of vLLM and TensorRT-LLM


def weight_bytes(at: Setting) -> float:
    """Bytes of the weights that one device holds."""
    of = at.precision
    stored = {"experts": of.experts, "qkv": of.weights, "output": of.weights, "mlp": of.weights}
    stored |= {"shared_expert": of.weights}
    found = {
        name: n * stored_bytes(stored.get(name, of.head)) for name, n in at.share.parameters_by_component().items()
    }
    found["experts"] /= at.parallel.expert
    return sum(found.values())


def memory_bytes(at: Setting, batch: npt.ArrayLike, positions: npt.ArrayLike) -> Array:
    """Bytes in main memory of one device: its weights, and cache and state of `batch` sequences of `positions`."""
    per_sequence = np.asarray(positions, dtype=float) * at.share.stored_kv_bytes_per_token(at.precision.cache)
    state = at.share.state_bytes_per_sequence(at.precision.head)
    sequences = at.parallel.of_replica(np.asarray(batch, dtype=float))
    return np.asarray(weight_bytes(at) + sequences * (per_sequence + state))


def usable_bytes(hardware: HardwareProfile) -> float:
    """Bytes that weights and caches may take: a share of what the driver offers, all of a CPU's main memory."""
    return hardware.usable_memory_bytes * (MEMORY_SHARE if hardware.kind == "gpu" else 1.0)


def require_memory(at: Setting, batch: int, context: int, slots: int) -> None:
    """Refuse what does not fit main memory, and say what would."""
    hardware = at.device.hardware
    capacity, needed = usable_bytes(hardware), float(memory_bytes(at, batch, context + slots))
    if needed <= capacity:
        return
    weights = weight_bytes(at)
    where = f"the {capacity / 1e9:.1f} GB of {hardware.name} that may be used"
    if float(memory_bytes(at, 1, 1 + slots)) > capacity:
        raise UserError(f"weights and caches must fit {where}, but the weights alone take {weights / 1e9:.1f} GB")
    most = _largest(lambda n: float(memory_bytes(at, n, context + slots)) <= capacity, batch)
    longest = _largest(lambda n: float(memory_bytes(at, batch, n + slots)) <= capacity, context)
    raise UserError(
        f"weights and caches must fit {where}, but batch {batch} at context {context} needs {needed / 1e9:.1f} GB; "
        f"{f'batch {most} fits there' if most else 'no batch fits there'}, and "
        f"{f'context {longest}' if longest else 'no context'} at that batch"
    )


def _largest(fits: Callable[[int], bool], beyond: int) -> int:
    """The largest number below `beyond`, which does not fit, that does; 0 if none."""
    low, high = 0, beyond
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
