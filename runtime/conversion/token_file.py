"""A user's own training tokens: a .npy or .safetensors file, read where it lies and never as a whole. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hardware.files import UserError
from runtime.config import require
from runtime.conversion.data import Batch

HELD_OUT = 20  # the last 1/20 of the file is for evaluation
Read = Callable[[int, int], npt.NDArray[Any]]


class TokenFile:
    """Token ids as one long row: a one-dimensional integer .npy array, or `tokens` in a .safetensors file.

    A .safetensors file may also hold `judged` (bool, as long as `tokens`): what a fine-tuning loss is taken over.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._judged: Read | None = None
        if self.path.suffix == ".npy":
            self.count, self._tokens = self._numpy()
        elif self.path.suffix == ".safetensors":
            self.count, self._tokens = self._safetensors()
        else:
            raise UserError(f"token files end in .npy or .safetensors, but got {self.path}")

    @property
    def has_judged(self) -> bool:
        """Whether the file says which tokens a fine-tuning loss is taken over."""
        return self._judged is not None

    def batches(
        self, seed: int, batch: int, length: int, *, vocabulary: int, start_step: int = 0, split: str = "train"
    ) -> Iterator[Batch]:
        """Endless batches of `length` consecutive tokens from random places; seed and step decide which.

        Documents are not told apart. UserError for a file shorter than a row, or an id outside the vocabulary.
        """
        held_out = self.count // HELD_OUT
        begin, end = (0, self.count - held_out) if split == "train" else (self.count - held_out, self.count)
        require(
            end - begin >= length,
            f"{self.path}: a row needs {length} tokens, but the {split} part ({'19' if split == 'train' else '1'} of "
            f"{HELD_OUT} parts) has {end - begin}",
        )

        def rows() -> Iterator[Batch]:
            step = start_step
            while True:
                places = np.random.default_rng([seed, step]).integers(begin, end - length + 1, size=batch)
                tokens = np.stack([self._tokens(p, p + length) for p in places]).astype(np.int64)
                if not (tokens.min() >= 0 and tokens.max() < vocabulary):
                    raise UserError(
                        f"{self.path}: 0 <= id < vocab_size = {vocabulary} must hold, but ids lie in "
                        f"[{tokens.min()}, {tokens.max()}]"
                    )
                judged = np.zeros(tokens.shape, dtype=np.bool_)
                if self._judged is not None:
                    judged = np.stack([self._judged(p, p + length) for p in places])
                yield Batch(tokens, judged)
                step += 1

        return rows()

    def _numpy(self) -> tuple[int, Read]:
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:  # a pickle is a ValueError: it is never run
            raise UserError(f"cannot read {self.path}: {' '.join(str(error).split())}") from error
        require(isinstance(array, np.ndarray), f"{self.path} is an archive, not one array")
        self._check(array.shape, np.issubdtype(array.dtype, np.integer), str(array.dtype))
        return len(array), lambda begin, end: array[begin:end]

    def _safetensors(self) -> tuple[int, Read]:
        from safetensors import SafetensorError, safe_open

        try:
            opened = safe_open(self.path, framework="numpy")
            names = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {self.path} (truncated or not safetensors): {error}") from error
        require("tokens" in names, f"{self.path} must hold `tokens`, but holds {', '.join(sorted(names)) or 'nothing'}")
        tokens = opened.get_slice("tokens")
        shape, kind = tuple(tokens.get_shape()), str(tokens.get_dtype())
        self._check(shape, kind[0] in "IU", kind)
        if "judged" in names:
            judged = opened.get_slice("judged")
            found, kind = tuple(judged.get_shape()), str(judged.get_dtype())
            require(
                kind == "BOOL" and found == shape,
                f"{self.path}: judged must be bool of shape {shape}, but is {kind} of shape {found}",
            )
            self._judged = lambda begin, end: judged[int(begin) : int(end)]
        return shape[0], lambda begin, end: tokens[int(begin) : int(end)]

    def _check(self, shape: tuple[int, ...], integer: bool, kind: str) -> None:
        require(
            integer and len(shape) == 1,
            f"{self.path}: tokens must be one row of integers, but are {kind} of shape {shape}",
        )
