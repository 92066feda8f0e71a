"""What the parts of `benchmarks.gpu` share: what is run, where results go, and what becomes of what cannot run."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autotune.objective import StageFailure
from hardware.files import UserError
from runtime.config import ModelConfig
from runtime.kernels.problem import Problem
from runtime.measurement import Measurement, append_jsonl, read_jsonl

RECORDS = ("forwards", "generations", "operators")  # files of measurements
RANDOM = "random weights: routing and acceptance are not real"


@dataclass(frozen=True)
class Tuning:
    """What is tuned: at which batches; decoding of so many prompts and new tokens of each.

    seeds: the model's first proposals. guided: at most so many more, corrected by what was measured.
    """

    batches: tuple[int, ...]
    prompts: int
    new_tokens: int
    seeds: int
    guided: int


@dataclass(frozen=True)
class Plan:
    """What is run: full size on a GPU, or a shrunk model on few points to test this program.

    drafts: K. levels: the proposal levels of single_forward. new_tokens: of the batch-1 generation, of every other
    generation, and of the comparison with `transformers`.
    """

    name: str
    model: ModelConfig
    dtype: Any
    batches: tuple[int, ...]
    context: int
    drafts: int
    levels: tuple[int, ...]
    repeats: int
    rounds: int
    new_tokens: tuple[int, int, int]
    bundled: bool  # whether zaya-nano's engines are compared too
    kernels: tuple[str, ...] | None  # that are checked; None: all
    tuning: Tuning


FULL = Plan(
    "zaya1-8b",
    ModelConfig(mask_token_id=262_271, eos_token_id=None),  # without an end token no random sequence stops early
    "bfloat16",
    (1, 16, 64, 128, 8),  # in the order of their worth
    1024,
    16,
    (0, 4, 7, 11),
    10,
    3,
    (128, 24, 24),
    True,
    None,
    Tuning((1, 16, 64), 16, 144, 8, 12),
)
SHRUNK = ModelConfig(
    vocab_size=264,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    moe_intermediate_size=32,
    router_hidden_size=16,
    max_position_embeddings=512,
    eos_token_id=None,
    pad_token_id=256,
    bos_token_id=257,
    mask_token_id=259,
)
SMALL = Plan(
    "zaya-shrunk",
    SHRUNK,
    "float32",
    (1, 2),
    16,
    4,
    (0, 2),
    2,
    2,
    (8, 4, 4),
    False,
    ("embed",),
    Tuning((1,), 1, 8, 1, 0),
)


@dataclass
class Session:
    """Where results go, and how much time is left. Parts append to the same files, each in a process of its own."""

    device: str
    out: Path
    deadline: float  # on time.monotonic's clock
    command: str

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(text, file=sys.stderr, flush=True)

    def attempt(self, point: str, run: Callable[[], Any]) -> Any:
        """run(), or None where it cannot: out of memory, not supported here, a kernel's error, or out of time.

        Any other error is a bug: it fails the run, but the points after it are still wanted.
        """
        if time.monotonic() > self.deadline:
            self.skip(point, "out of time")
            return None
        reason = ""
        try:
            return run()
        except Exception as error:
            # Torch's errors are RuntimeErrors; a StageFailure is a child process's, or a setting's.
            expected = isinstance(error, (RuntimeError, UserError, ImportError, StageFailure))
            if not expected and not type(error).__module__.startswith("triton"):
                traceback.print_exc()
                self.check(f"{point} runs without a bug", False, error=repr(error))
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        # Outside of the handler: the traceback, and with it the failed run's tensors, is gone.
        self.release()
        self.skip(point, reason)
        return None

    def release(self) -> None:
        """Give the device's memory of dead tensors back."""
        if self.device.startswith("cuda"):
            gc.collect()
            torch.cuda.empty_cache()

    def measure(self, name: str, point: str, run: Callable[[], Measurement]) -> Measurement | None:
        """Append the record to NAME.jsonl, where there is one; it is on disk when this returns."""
        record: Measurement | None = self.attempt(point, run)
        if record is not None:
            append_jsonl(self.out / f"{name}.jsonl", record)
            self.say(f"  {record.median_seconds * 1e3:10.3f} ms  {point}")
        return record

    def records(self, name: str) -> list[Measurement]:
        """What `measure` has appended so far, by any part."""
        path = self.out / f"{name}.jsonl"
        return read_jsonl(path) if path.is_file() else []

    def write(self, file: str, /, **facts: Any) -> None:
        """Append a line to FILE.jsonl that is no record."""
        with (self.out / f"{file}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(facts) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What `write` has appended so far."""
        path = self.out / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def check(self, name: str, passed: bool, **facts: Any) -> None:
        """Keep the outcome of one correctness check."""
        self.write("correctness", check=name, passed=passed, **facts)
        self.say(f"  {'ok    ' if passed else 'FAILED'} {name} {facts}")

    def skip(self, point: str, reason: str) -> None:
        """Keep why a point has no result."""
        self.write("skipped", point=point, reason=reason)
        self.say(f"  skipped {point}: {reason}")


def timed_problems(plan: Plan) -> tuple[tuple[str, Problem], ...]:
    """Kernels and problems that are timed beside a copy: what a step spends its time on, the most valuable first."""
    config, slots, context = plan.model, plan.drafts + 1, plan.context
    decode, verify = Problem(config, 1, 1, context), Problem(config, 16, slots, context)
    one, many = Problem(config, 1, slots, context), Problem(config, 128, 1, context)
    large = Problem(config, 128, slots, context)
    problems = [(kernel, p) for p in (decode, verify, many, one, large) for kernel in ("experts", "attention")]
    others = ("cca", "router", "residual_norm", "draw", "verify")
    return (
        *problems,
        *((kernel, p) for p in (decode, verify) for kernel in others if (kernel, p) != ("verify", decode)),
    )
