"""The built-in training text: worked tasks and Python standard-library source, in any vocabulary. No torch here."""

from __future__ import annotations

import bisect
import os
import random
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hardware.files import UserError, known
from runtime.config import ModelConfig, require
from runtime.conversion.tasks import FAMILIES, SPLITS, Problem, draw, generate
from runtime.tokenizer import BOS, EOS, VOCABULARY, ByteTokenizer, Tokenizer

# Tests and vendored packages are no library source; encodings are generated tables.
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "idlelib", "encodings"}


@dataclass(frozen=True)
class _Source:
    """The files of one split, concatenated. `ends` are the files' end offsets in bytes, ascending."""

    text: bytes
    ends: tuple[int, ...]

    def excerpt(self, rng: random.Random, length: int) -> tuple[bytes, bool]:
        """Up to `length` bytes of one file from a random line start; whether the end of the file was reached."""
        position = rng.randrange(len(self.text))
        end = self.ends[bisect.bisect_right(self.ends, position)]
        begin = self.text.rfind(b"\n", 0, position) + 1
        stop = min(begin + length, end)
        return self.text[begin:stop], stop == end


def _held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % 20 == 0


def _sources(root: Path) -> Iterator[str]:
    """Files below the folder, by their path from there. Folders that are excluded are not even listed."""
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - EXCLUDED
        for name in names:
            # _sysconfigdata is no source either: it names one machine's build.
            path = Path(folder, name).relative_to(root).as_posix()
            if name.endswith(".py") and not path.startswith("_sysconfigdata"):
                yield path


@lru_cache(maxsize=2)
def _source(split: str) -> _Source:
    if split not in SPLITS:
        raise known("split", split, SPLITS)
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(_sources(root))
    files = [(root / n).read_bytes() for n in names if _held_out(n) == (split == "test")]
    # A final newline on each, so that every file begins at a line start of the whole.
    files = [text if text.endswith(b"\n") else text + b"\n" for text in files if text]
    if not files:
        raise UserError(f"this Python has no standard-library source in {root}")
    return _Source(b"".join(files), tuple(accumulate(map(len, files))))


def source_text(split: str) -> bytes:
    """The running interpreter's standard-library source of one split; about 5% of the files are held out for "test"."""
    return _source(split).text


@dataclass(frozen=True)
class Encoding:
    """How a document becomes tokens: `begin`, the text's ids, `end`."""

    encode: Callable[[bytes], list[int]]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    token_bytes: int  # text read per token of a row; what is too much is cut

    def prompt(self, problem: Problem) -> list[int]:
        """A problem as the model is asked it."""
        return [*self.begin, *self.encode(problem.prompt.encode())]


BYTE_ENCODING = Encoding(list, (BOS,), (EOS,), 1)


def encoding_of(tokenizer: Tokenizer, config: ModelConfig) -> Encoding:
    """The encoding of a checkpoint, with its own specials. UserError where no tokenizer says what its ids mean."""
    if isinstance(tokenizer, ByteTokenizer):
        require(
            config.vocab_size == VOCABULARY,
            f"without a tokenizer.json the vocabulary must be the {VOCABULARY} bytes and specials, but it has "
            f"{config.vocab_size} ids; put the tokenizer.json beside the weights, or give each stage `data` in tokens",
        )
        return BYTE_ENCODING

    def encode(text: bytes) -> list[int]:
        return tokenizer.encode(text.decode("utf-8", errors="ignore"))  # an excerpt may cut a character

    begin = () if config.bos_token_id is None else (config.bos_token_id,)
    return Encoding(encode, begin, config.stop_token_ids[:1], 8)


@dataclass(frozen=True)
class Batch:
    """Token ids int64 [batch, length], and which of them a fine-tuning loss judges: bool of the same shape."""

    tokens: npt.NDArray[np.int64]
    solutions: npt.NDArray[np.bool_]  # worked solutions with their EOS; nothing of source text


def _task_row(
    rng: random.Random, length: int, families: list[str], weights: list[float], encoding: Encoding, split: str
) -> tuple[list[int], list[bool]]:
    row: list[int] = []
    solution: list[bool] = []
    while len(row) < length:
        problem = draw(rng.choices(families, weights)[0], rng, split)
        prompt, worked = encoding.prompt(problem), [*encoding.encode(problem.solution.encode()), *encoding.end]
        row += prompt + worked
        solution += [False] * len(prompt) + [True] * len(worked)
    return row[:length], solution[:length]


def _source_row(rng: random.Random, length: int, source: _Source, encoding: Encoding) -> list[int]:
    row: list[int] = []
    while len(row) < length:
        text, ended = source.excerpt(rng, (length - 1) * encoding.token_bytes)
        row += [*encoding.begin, *encoding.encode(text), *(encoding.end if ended else ())]
    return row[:length]


def training_batches(
    seed: int,
    batch: int,
    length: int,
    *,
    task_share: float = 0.7,
    weights: Mapping[str, float] | None = None,
    encoding: Encoding = BYTE_ENCODING,
    start_step: int = 0,
    split: str = "train",
) -> Iterator[Batch]:
    """Endless batches; the same seed and step always give the same batch.

    A row is, with probability `task_share`, worked problems of the split (BOS document EOS BOS ..., the last one cut),
    else an excerpt of source from a line start (BOS excerpt; EOS only at the end of a file). So `task_share` is also
    the share of the tokens. `weights` are relative family weights (default: equal; a family left out gets none).
    """
    if not 0.0 <= task_share <= 1.0:
        raise UserError(f"0 <= task_share <= 1 must hold, but got {task_share}")
    shares = dict(weights) if weights is not None else dict.fromkeys(FAMILIES, 1.0)
    for name in shares:
        if name not in FAMILIES:
            raise known("task family", name, FAMILIES)
    if min(shares.values(), default=0.0) < 0 or sum(shares.values()) <= 0:
        raise UserError(f"task weights must be >= 0 with a positive sum, but got {shares}")
    families = sorted(shares)
    numbers = [shares[name] for name in families]
    source = _source(split)

    def batches() -> Iterator[Batch]:
        step = start_step
        while True:
            rng = random.Random(f"{seed}/{step}")
            rows = [
                _task_row(rng, length, families, numbers, encoding, split)
                if rng.random() < task_share
                else (_source_row(rng, length, source, encoding), [False] * length)
                for _ in range(batch)
            ]
            yield Batch(np.array([ids for ids, _ in rows], dtype=np.int64), np.array([marks for _, marks in rows]))
            step += 1

    return batches()


def evaluation_problems(family: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` distinct held-out problems of one family."""
    found: dict[str, Problem] = {}
    index = 0
    while len(found) < count:
        if index > 50 * count + 1000:
            raise UserError(f"task family {family} has fewer than {count} held-out problems")
        problem = generate(family, seed * 1_000_003 + index, "test")
        found.setdefault(problem.prompt, problem)
        index += 1
    return list(found.values())


def source_prompts(
    count: int, prompt_bytes: int, seed: int = 0, continuation_bytes: int = 256
) -> list[tuple[bytes, bytes]]:
    """`count` pairs (prompt, true continuation) of these lengths from held-out files, each from a line start."""
    source, rng = _source("test"), random.Random(f"prompts/{seed}")
    wanted = prompt_bytes + continuation_bytes
    longest = max(end - begin for begin, end in zip((0, *source.ends), source.ends, strict=False))
    if longest < wanted:
        raise UserError(f"prompt + continuation must fit the longest held-out file ({longest} bytes), but got {wanted}")
    pairs: list[tuple[bytes, bytes]] = []
    while len(pairs) < count:
        text, _ = source.excerpt(rng, wanted)
        if len(text) == wanted:
            pairs.append((text[:prompt_bytes], text[prompt_bytes:]))
    return pairs
