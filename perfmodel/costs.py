"""What one operator of a forward costs, as sizes: its work, its matmuls and its calls of the kernel library."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perfmodel.kernels.call import Array, Attention, Collective, FusedMoe

Call = Attention | FusedMoe | Collective


@dataclass(frozen=True)
class Shape:
    """Forwards to cost: numbers or arrays that broadcast against each other."""

    batch: Array  # sequences
    slots: Array  # token slots per sequence
    context: Array  # cached tokens per sequence
    head_rows: Array  # rows per sequence that the LM head projects
    pairs: Array | None = None  # how often a slot sees a slot of its sequence, at least; None: they are causal
    head_passes: int = 1  # projections by the LM head that the rows take

    @property
    def tokens(self) -> Array:
        """Slots of all sequences: the rows of every linear layer."""
        return self.batch * self.slots


def shape(
    batch: npt.ArrayLike,
    slots: npt.ArrayLike,
    context: npt.ArrayLike,
    head_rows: npt.ArrayLike,
    pairs: Array | None = None,
    head_passes: int = 1,
) -> Shape:
    """Numbers or arrays as a `Shape`."""
    sequences, width, cached, rows = (np.asarray(a, dtype=float) for a in (batch, slots, context, head_rows))
    return Shape(sequences, width, cached, rows, pairs, head_passes)


@dataclass(frozen=True)
class Matmul:
    """`count` products [rows, inner] x [inner, outer] of one forward, over all layers."""

    count: Array
    rows: Array
    inner: int
    outer: int

    @property
    def flops(self) -> Array:
        """Multiplications and additions of all of them."""
        return 2.0 * self.count * self.rows * self.inner * self.outer


@dataclass(frozen=True)
class OperatorCost:
    """The work of one operator, summed over the layers of a forward.

    weight_bytes: parameters read, each once. kv_bytes: cache and state, read or written. activation_bytes: what lies
    between operators, each written and read once; `activation_set_bytes` of them live at a time, in one layer.
    repeat: how often a forward runs it. calls: what it is of the kernel library, each with how often it is made, where
    it is more than its matmuls and bytes.
    """

    name: str
    flops: Array  # masked attention scores included, as plain kernels compute them
    least_flops: Array  # without them: no kernel can do less
    weight_bytes: Array
    kv_bytes: Array
    activation_bytes: Array
    activation_set_bytes: Array
    matmuls: tuple[Matmul, ...] = ()
    repeat: float = 1.0
    calls: tuple[tuple[float, Call], ...] = ()
    dtypes: tuple[str, str] | None = None  # weights and activations that are multiplied; None: nothing is

    @property
    def bytes(self) -> Array:
        """Everything moved."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


def gated(hidden: int, width: int, count: Array, rows: Array) -> tuple[Matmul, ...]:
    """Gate with up, and down, of `count` MLPs of that width with `rows` tokens each."""
    return (Matmul(count, rows, hidden, 2 * width), Matmul(count, rows, width, hidden))


_NOTHING = np.zeros(())


def cost_of(
    name: str,
    *,
    repeat: float = 1.0,
    weight_bytes: Array | float = 0.0,
    kv_bytes: Array | float = 0.0,
    activation_set_bytes: Array | float = 0.0,
    matmuls: tuple[Matmul, ...] = (),
    flops: Array | None = None,
    least_flops: Array | None = None,
    calls: tuple[tuple[float, Call], ...] = (),
    dtypes: tuple[str, str] | None = None,
) -> OperatorCost:
    """Bytes are of one layer, done `repeat` times; FLOPs (default: the matmuls') of all."""
    done = sum((m.flops for m in matmuls), _NOTHING) if flops is None else flops
    moved = np.asarray(activation_set_bytes)
    return OperatorCost(
        name=name,
        flops=done,
        least_flops=done if least_flops is None else least_flops,
        weight_bytes=np.asarray(repeat * weight_bytes),
        kv_bytes=np.asarray(repeat * kv_bytes),
        activation_bytes=np.asarray(repeat * moved),
        activation_set_bytes=moved,
        matmuls=matmuls,
        repeat=repeat,
        calls=calls,
        dtypes=dtypes,
    )
