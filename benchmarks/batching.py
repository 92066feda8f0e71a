"""Continuous batching: 200 requests get the tokens they get alone; its throughput beside that of closed batches.

python -m benchmarks.batching [--model zaya-nano] [--batch 8] [--out measurements/zaya-nano/batching.json]

Exits with 1 when any token differs. All is greedy. Closed batches take the requests in order, so many at a time, and
drain; continuous batching refills a slot as soon as its request ends. The rounds of both alternate.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import counting, fail_in_one_line, origin
from hardware.files import plain, write_atomic
from runtime.bench import interleave, paired_ratio
from runtime.bench_generation import GenerationSample, sample_generation, task_prompts
from runtime.checkpoint import load_model
from runtime.config import DecodingConfig, require
from runtime.engine import generate
from runtime.measurement import interval_name
from runtime.model.zaya import Zaya

WAYS = {
    "autoregressive": DecodingConfig(),
    "two_forward": DecodingConfig("two_forward"),
    "single_forward": DecodingConfig("single_forward", proposal_levels=(0, 4, 7, 11)),
    "denoising, verified": DecodingConfig("denoising", denoising_steps=2, verify=True),
}


def limits_of(count: int, longest: int, seed: int) -> list[int]:
    """The most new tokens of each request, between a tenth of the longest and the longest."""
    rng = random.Random(f"limits/{seed}")
    return [rng.randint(max(1, longest // 10), longest) for _ in range(count)]


def alone(model: Zaya, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
    """Greedy autoregressive outputs, one request at a time."""
    show = counting(len(prompts))
    outputs = []
    for done, (prompt, limit) in enumerate(zip(prompts, limits, strict=True), 1):
        outputs += generate(model, [prompt], DecodingConfig(), max_new_tokens=limit).tokens
        show(done)
    return outputs


def differences(
    model: Zaya, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Where a request's tokens first differ, and by what margin of its logits: near 0 it is a tie within rounding."""
    different = []
    for index, (right, mine) in enumerate(zip(expected, found, strict=True)):
        if list(right) != list(mine):
            at = next((i for i, (a, b) in enumerate(zip(right, mine, strict=False)) if a != b), None)
            margin = None
            if at is not None:
                with torch.inference_mode():
                    logits = model.logits(torch.tensor([[*prompts[index], *right[:at]]]))[0, -1]
                margin = float(logits[right[at]] - logits[mine[at]])
            different.append({"request": index, "position": at, "margin": margin})
    return different


def rates(samples: Sequence[GenerationSample]) -> dict[str, Any]:
    """Medians over rounds, and each round's decoding seconds."""
    wall = [s.seconds + s.prefill_seconds for s in samples]
    full = [rate for s in samples if (rate := s.full_tokens_per_second) is not None]
    return {
        "tokens_per_second": statistics.median(s.tokens_per_second for s in samples),
        "full_tokens_per_second": statistics.median(full) if full else None,
        "tokens_per_second_with_prefill": statistics.median(s.tokens / t for s, t in zip(samples, wall, strict=True)),
        "full_share_of_seconds": statistics.median(s.full_seconds / s.seconds for s in samples),
        "seconds": [s.seconds for s in samples],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    chosen = _arguments(arguments)
    for name in ("requests", "new_tokens", "batch", "rounds", "threads"):
        require(getattr(chosen, name) >= 1, f"{name} >= 1 must hold, but got {getattr(chosen, name)}")
    torch.set_num_threads(chosen.threads)
    model = load_model(chosen.model)
    prompts = task_prompts(model, chosen.requests, seed=chosen.seed)
    limits = limits_of(chosen.requests, chosen.new_tokens, chosen.seed)
    print("one request at a time, autoregressive", file=sys.stderr)
    expected = alone(model, prompts, limits)
    work: dict[str, Any] = {"batch": chosen.batch, "max_new_tokens": limits, "seed": chosen.seed}
    found: dict[str, Any] = {}
    for name, decoding in WAYS.items():
        print(f"{name}: {chosen.rounds} rounds", file=sys.stderr)
        runs = {
            mode: partial(sample_generation, model, prompts, decoding, batching=mode, **work)
            for mode in ("closed", "continuous")
        }
        samples = interleave(runs, chosen.rounds, progress=counting(len(runs) * (chosen.rounds + 1)))
        speeds = {mode: [s.tokens_per_second for s in of_mode] for mode, of_mode in samples.items()}
        found[name] = {
            "decoding": plain(decoding),
            "different": {
                mode: differences(model, prompts, expected, of_mode[0].outputs) for mode, of_mode in samples.items()
            },
            **{mode: rates(of_mode) for mode, of_mode in samples.items()},
            "continuous_over_closed": paired_ratio(speeds["continuous"], speeds["closed"]),
        }
    document = {
        **origin("benchmarks.batching", arguments, chosen.model, model),
        "requests": chosen.requests,
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "new_tokens": [min(map(len, expected)), max(map(len, expected))],
        "batch": chosen.batch,
        "rounds": chosen.rounds,
        "ways": found,
    }
    text = json.dumps(document, indent=1) + "\n"
    if chosen.out is not None:
        write_atomic(chosen.out, text)
    print(text if chosen.json else _table(document), end="")
    return 1 if any(any(way["different"].values()) for way in found.values()) else 0


def _table(document: dict[str, Any]) -> str:
    lines = [
        f"| {document['requests']} requests on {document['batch']} slots | requests that differ | closed, tokens/s "
        "| closed, full steps | continuous, tokens/s | continuous, full steps "
        f"| continuous / closed ({interval_name(document['rounds'])}) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, way in document["ways"].items():
        ratio, low, high = way["continuous_over_closed"]
        figures = [way[mode][key] for mode in ("closed", "continuous") for key in _RATES]
        shown = " | ".join("-" if figure is None else f"{figure:.1f}" for figure in figures)
        lines.append(
            f"| {name} | {sum(map(len, way['different'].values()))} | {shown} | {ratio:.2f} ({low:.2f}-{high:.2f}) |"
        )
    return "\n".join(lines) + "\n"


_RATES = ("tokens_per_second", "full_tokens_per_second")


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zaya-nano", help="a checkpoint's name or folder")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=150, help="of the longest request; the others have fewer")
    parser.add_argument("--batch", type=int, default=8, help="slots")
    parser.add_argument("--rounds", type=int, default=6, help="timed passes over all requests, of each batching")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the whole result")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
