"""One measured run, with everything needed to trust it and to repeat it. Torch-free."""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hardware.files import UserError, build, plain
from runtime.config import DecodingConfig, KernelConfig, Workload, require

Kind = Literal["forward", "generation", "operator"]
ForwardKind = Literal["decode", "draft", "verify", "single"]
Batching = Literal["closed", "continuous"]
INTERVAL_ROUNDS = 6  # the fewest whose range holds the median with 95%: 1 - 2 / 2^6 = 96.9%


def interval_name(rounds: int) -> str:
    """What low and high of `statistics.paired_ratio` are: with fewer than `INTERVAL_ROUNDS` only the range seen."""
    return "95% interval" if rounds >= INTERVAL_ROUNDS else f"range of {rounds} rounds"


@dataclass(frozen=True)
class Measurement:
    """Raw samples of one quantity at one operating point.

    kind "forward": `seconds` are the times of one forward of `batch` x `slots` tokens over `context` cached tokens.
    kind "operator": `seconds` are those that one operator took in such a forward, all layers together.
    kind "generation": `seconds` are whole generations; `tokens` their committed tokens (one count per sample).
    `simulated` names what was not real (for example "random weights; imposed acceptance"), or is None.
    """

    kind: Kind
    model: str
    model_hash: str
    device: dict[str, Any]  # hardware.fingerprint.fingerprint(): device, cpu, software versions
    command: str
    commit: str
    date: str
    workload: Workload
    decoding: DecodingConfig
    kernels: KernelConfig
    slots: int
    context: int
    seconds: tuple[float, ...]
    tokens: tuple[int, ...] = ()
    forwards: int = 0
    acceptance_histogram: tuple[int, ...] = ()  # entry n: steps that committed n + 1 tokens, the last ones cut
    experts_per_layer: float | None = None  # distinct experts a layer ran in one forward, mean over layers
    quality: dict[str, float] = field(default_factory=dict)
    simulated: str | None = None
    forward: ForwardKind | None = None  # of a forward or an operator: a draft and a verify differ at equal slots
    operator: str | None = None  # which one a record of kind "operator" is about, by perfmodel's names
    batching: Batching = "closed"  # of a generation: batches that drain, or slots that are refilled
    full_tokens_per_second: float | None = None  # of a generation: median over the steps with a sequence in every slot

    def __post_init__(self) -> None:
        require(len(self.seconds) >= 1, "a measurement must have at least one sample")
        require(all(0 < s < math.inf for s in self.seconds), f"0 < seconds must hold, but got {self.seconds}")
        require(
            (self.operator is not None) == (self.kind == "operator"),
            f"a record names an operator when its kind is 'operator', but its kind is {self.kind!r} and it names "
            f"{self.operator!r}",
        )
        require(
            len(self.tokens) == (len(self.seconds) if self.kind == "generation" else 0),
            f"a {self.kind} has {'one token count per sample' if self.kind == 'generation' else 'no token counts'}, "
            f"but got {len(self.tokens)} for {len(self.seconds)} samples",
        )

    @property
    def median_seconds(self) -> float:
        """Median of the samples."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median (0 for a single sample)."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median_seconds

    @property
    def tokens_per_second(self) -> float:
        """Median over samples of committed tokens per second; UserError for a forward."""
        if not self.tokens:
            raise UserError("tokens_per_second needs a measurement of kind 'generation'")
        return statistics.median(n / s for n, s in zip(self.tokens, self.seconds, strict=True))

    @property
    def acceptance_length(self) -> float | None:
        """Mean tokens committed per step, counting the one the verifier adds; None without drafts."""
        steps = sum(self.acceptance_histogram)
        if not steps:
            return None
        return 1 + sum(n * count for n, count in enumerate(self.acceptance_histogram)) / steps


def append_jsonl(path: str | os.PathLike[str], measurement: Measurement) -> None:
    """Append one record as one line, in a single write, so that a killed run loses at most that record."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(plain(measurement)) + "\n").encode()
        with path.open("a+b") as stream:
            if stream.tell() > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # behind a line that a kill cut: start one, instead of being lost with it
                    line = b"\n" + line
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_jsonl(path: str | os.PathLike[str]) -> list[Measurement]:
    """Read records back. A line that is not a record, a cut last one too, raises UserError with its number."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return parse_jsonl(text, str(path))


def parse_jsonl(text: str, path: str) -> list[Measurement]:
    """The records in a file's text; `path` names it in UserErrors, as those of `read_jsonl`."""
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter: nested beyond any record
            raise UserError(f"{path} line {number} is not valid JSON: {getattr(error, 'msg', error)}") from error
        if isinstance(data, dict) and isinstance(kernels := data.get("kernels"), dict):
            if "experts" in kernels:
                kernels["experts"] = _by_number(kernels["experts"])
            if isinstance(tilings := kernels.get("tilings"), dict):
                kernels["tilings"] = {name: _by_number(buckets) for name, buckets in tilings.items()}
        records.append(build(Measurement, data, f"{path} line {number}"))
    return records


def _by_number(data: Any) -> Any:
    """JSON has no integer keys."""
    return {int(k) if k.isdecimal() else k: v for k, v in data.items()} if isinstance(data, dict) else data
