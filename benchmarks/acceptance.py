"""Acceptance predicted from stored logits against observed acceptance, over at least 10,000 judged drafts per setting.

python -m benchmarks.acceptance [--model zaya-nano] [--positions 10000] [--json]

A draft is judged when all drafts before it in its step were accepted. Prediction: 1 - TV(p, q) of its rows of logits,
p(x) for an argmax draft. Exits with 1 when a setting's mean prediction is more than 0.02 from the share that was
accepted. Three quarters of the prompts are held-out tasks, the others source text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import counting, fail_in_one_line, origin
from benchmarks.equivalence import prompts_for
from hardware.files import UserError, plain
from runtime.checkpoint import load_model
from runtime.config import DecodingConfig, require
from runtime.engine import generate
from runtime.logits import StoredLogits, collect, histogram_from_acceptance, save_logits
from runtime.model.zaya import Zaya
from runtime.samplers.state import TraceStep
from runtime.statistics import wilson

TOLERANCE = 0.02  # of the must-show: absolute, over all positions
BATCH = 32
NEW_TOKENS = 96
SETTINGS = {
    "two_forward T=0.8": DecodingConfig("two_forward", temperature=0.8, draft_temperature=0.8),
    "two_forward T=1": DecodingConfig("two_forward", temperature=1.0, draft_temperature=1.0),
    "two_forward T=0.8, argmax drafts": DecodingConfig("two_forward", temperature=0.8),
    "single_forward T=0.8": DecodingConfig(
        "single_forward", temperature=0.8, draft_temperature=0.8, proposal_levels=(0, 4, 7, 11)
    ),
}


@dataclass(frozen=True)
class Share:
    """Drafts that were judged, the share accepted with its 95% binomial (Wilson) interval, and what was predicted."""

    judged: int
    observed: float
    low: float
    high: float
    predicted: float


@dataclass(frozen=True)
class Run:
    """One setting. Histograms: the share of steps that accepted n drafts, predicted by chaining the positions."""

    name: str
    decoding: DecodingConfig
    steps: int  # of single sequences
    overall: Share
    deviations: float  # observed minus predicted share, in standard deviations of the observed one given the logits
    by_position: list[Share]
    histogram: list[float]
    predicted_histogram: list[float]
    acceptance_length: float  # tokens per step
    predicted_acceptance_length: float


def judge(
    model: Zaya,
    decoding: DecodingConfig,
    positions: int,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> StoredLogits:
    """Generate, BATCH prompts at a time, until at least `positions` drafts were judged; the logits of all of it."""
    trace: list[TraceStep] = []
    prompts = prompts_for(model, max(BATCH, positions // 8), seed)
    for begin in range(0, len(prompts), BATCH):
        part: list[TraceStep] = []
        batch = prompts[begin : begin + BATCH]
        generate(model, batch, decoding, max_new_tokens=NEW_TOKENS, seed=seed + begin, trace=part)
        trace += [step._replace(sequences=[begin + i for i in step.sequences]) for step in part]
        stored = collect(trace, decoding)
        if progress:
            progress(min(positions, len(stored.row)))
        if len(stored.row) >= positions:
            return stored
    raise UserError(f"{len(prompts)} prompts judged {len(stored.row)} drafts, fewer than the {positions} wanted")


def compare(name: str, stored: StoredLogits) -> Run:
    """What was accepted against what the logits say, overall and by position in the block."""
    predicted = stored.expected_acceptance()
    places = stored.place[stored.row]
    observed_histogram = histogram_from_acceptance(stored, stored.accepted)
    predicted_histogram = histogram_from_acceptance(stored, predicted)
    deviation = float((predicted * (1 - predicted)).sum().sqrt())
    off = float(stored.accepted.double().sum() - predicted.sum())
    return Run(
        name,
        stored.decoding,
        stored.steps,
        _share(stored.accepted, predicted),
        off / deviation if deviation else 0.0,
        [_share(stored.accepted[places == i], predicted[places == i]) for i in range(int(places.max()) + 1)],
        observed_histogram,
        predicted_histogram,
        _length(observed_histogram),
        _length(predicted_histogram),
    )


def _share(accepted: Tensor, predicted: Tensor) -> Share:
    found = wilson(int(accepted.sum()), len(accepted))
    return Share(found.count, found.value, found.low, found.high, float(predicted.mean()))


def _length(histogram: list[float]) -> float:
    return 1 + sum(n * share for n, share in enumerate(histogram))


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    chosen = _arguments(arguments)
    for name in ("positions", "threads"):
        require(getattr(chosen, name) >= 1, f"{name} >= 1 must hold, but got {getattr(chosen, name)}")
    torch.set_num_threads(chosen.threads)
    model = load_model(chosen.model)
    where = origin("benchmarks.acceptance", arguments, chosen.model, model)
    runs = []
    for name, decoding in SETTINGS.items():
        print(name, file=sys.stderr)
        stored = judge(model, decoding, chosen.positions, seed=chosen.seed, progress=counting(chosen.positions))
        if chosen.logits is not None:
            save_logits(stored, chosen.logits / f"{name.replace(' ', '-').replace(',', '')}.safetensors", where)
        runs.append(compare(name, stored))
    held = all(abs(run.overall.observed - run.overall.predicted) <= TOLERANCE for run in runs)
    document = {**where, "tolerance": TOLERANCE, "held": held, "runs": plain(runs)}
    print(json.dumps(document, indent=1) if chosen.json else _table(runs))
    return 0 if held else 1


def _table(runs: list[Run]) -> str:
    lines = ["setting                           judged  accepted (95%)          predicted  length  predicted"]
    for run in runs:
        o = run.overall
        lines.append(
            f"{run.name:32}  {o.judged:6}  {o.observed:.4f} [{o.low:.4f}, {o.high:.4f}]  {o.predicted:9.4f}"
            f"  {run.acceptance_length:6.2f}  {run.predicted_acceptance_length:9.2f}"
        )
    return "\n".join(lines)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zaya-nano", help="a checkpoint folder or a bundled name")
    parser.add_argument("--positions", type=int, default=10_000, help="judged drafts per setting, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--logits", type=Path, help="a folder for the stored logits, one file per setting")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
