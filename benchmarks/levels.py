"""Proposal levels for single_forward: measure what fresh drafts accept, choose levels, measure each choice.

python -m benchmarks.levels [--model zaya-nano] [--draft-tokens 16] [--counts 1,2,3,4,6] [--levels 0,4,7,11] [--json]

The histogram is that of all levels, where every draft is fresh. Tokens per step leave out a sequence's first step,
which has no drafts, and count all that a step committed, even beyond the length limit. A choice is predicted and
measured on the same prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.common import counting, fail_in_one_line, origin
from benchmarks.equivalence import prompts_for
from hardware.files import plain
from runtime.checkpoint import load_model
from runtime.config import DecodingConfig, require
from runtime.engine import generate
from runtime.levels import expected_tokens, optimal, steady_tokens
from runtime.model.zaya import Zaya
from runtime.samplers.state import TraceStep
from runtime.statistics import Estimate, ratio


@dataclass(frozen=True)
class Accepted:
    """Drafts accepted per step, by sequence, without first steps; and seconds per step of the batch."""

    by_sequence: list[list[int]]
    seconds_per_step: float

    @property
    def tokens(self) -> Estimate:
        """Committed per step of a sequence, with an interval over sequences."""
        return ratio([sum(s) + len(s) for s in self.by_sequence], [len(s) for s in self.by_sequence])

    def histogram(self, draft_tokens: int) -> list[int]:
        """Entry n: steps that accepted n drafts, n = 0 .. K."""
        steps = [n for sequence in self.by_sequence for n in sequence]
        return [steps.count(n) for n in range(draft_tokens + 1)]


@dataclass(frozen=True)
class Choice:
    """Levels, the tokens per step predicted for them from the histogram of all levels, and what was measured."""

    levels: tuple[int, ...]
    slots: int
    predicted_next: float  # of the step behind a fresh one
    predicted: float  # in the long run
    measured: Estimate
    seconds_per_step: float


def measure(
    model: Zaya,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    *,
    batch: int,
    new_tokens: int,
    seed: int = 0,
) -> Accepted:
    """Decode the prompts, `batch` at a time."""
    trace: list[TraceStep] = []
    result = generate(
        model, prompts, decoding, max_new_tokens=new_tokens, stop_tokens=(), batch=batch, seed=seed, trace=trace
    )
    steps: dict[int, list[int]] = {}
    for step in trace:
        for sequence, committed in zip(step.sequences, step.committed, strict=True):
            steps.setdefault(sequence, []).append(committed - 1)
    return Accepted([rows[1:] for rows in steps.values() if len(rows) > 1], result.decode_seconds / len(trace))


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    chosen = _arguments(arguments)
    drafts = chosen.draft_tokens
    torch.set_num_threads(chosen.threads)
    model = load_model(chosen.model)
    prompts = prompts_for(model, chosen.prompts, chosen.seed)
    progress = counting(1 + len(chosen.counts) + len(chosen.levels))

    def run(levels: tuple[int, ...] | None) -> Accepted:
        decoding = DecodingConfig(
            "single_forward",
            drafts,
            temperature=chosen.temperature,
            draft_temperature=chosen.temperature,
            proposal_levels=levels,
        )
        return measure(model, prompts, decoding, batch=chosen.batch, new_tokens=chosen.new_tokens, seed=chosen.seed)

    dense = run(None)
    progress(1)
    histogram = dense.histogram(drafts)
    everything = tuple(range(drafts + 1))
    found = {everything: dense}
    for levels in [*(optimal(histogram, count) for count in chosen.counts), *chosen.levels]:
        found[levels] = found.get(levels) or run(levels)
        progress(len(found))
    choices = [
        Choice(
            levels,
            (drafts + 1) * (1 + len(levels)),
            expected_tokens(histogram, levels),
            steady_tokens(histogram, levels),
            accepted.tokens,
            accepted.seconds_per_step,
        )
        for levels, accepted in found.items()
    ]
    document = {
        **origin("benchmarks.levels", arguments, chosen.model, model),
        "batch": chosen.batch,
        "temperature": chosen.temperature,
        "histogram": histogram,
        "choices": plain(choices),
    }
    print(json.dumps(document, indent=1) if chosen.json else _table(histogram, choices))
    return 0


def _table(histogram: list[int], choices: list[Choice]) -> str:
    lines = [
        f"fresh drafts accepted: {histogram}",
        "levels                  slots  predicted  tokens/step (95%)    ms/step",
    ]
    for c in choices:
        name = "all" if len(c.levels) == len(histogram) else ",".join(map(str, c.levels))
        m = c.measured
        lines.append(
            f"{name:22}  {c.slots:5}  {c.predicted:9.2f}  {m.value:5.2f} [{m.low:.2f}, {m.high:.2f}]  "
            f"{1e3 * c.seconds_per_step:9.2f}"
        )
    return "\n".join(lines)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zaya-nano", help="a checkpoint folder or a bundled name")
    parser.add_argument("--draft-tokens", type=int, default=16)
    parser.add_argument("--counts", type=_numbers, default=(1, 2, 3, 4, 6), help="how many levels to choose")
    parser.add_argument("--levels", type=_numbers, action="append", default=[], help="a further choice to measure")
    parser.add_argument("--temperature", type=float, default=0.0, help="of drafts and target")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    chosen = parser.parse_args(arguments)
    for name in ("draft_tokens", "prompts", "new_tokens", "batch", "threads"):
        require(getattr(chosen, name) >= 1, f"{name} >= 1 must hold, but got {getattr(chosen, name)}")
    return chosen


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
