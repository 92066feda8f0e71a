"""Is an exported deployment as fast as the study measured it? Each rule is followed by `runtime.generate` on the work
of its study, alternating with the tuned settings given directly and with the default.

python -m benchmarks.followed --study runs/tune --deployment deployment.yaml [--effort standard] [--rounds 8]

The effort must be the one that the study was made with: it says what is decoded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotune.effort import effort
from autotune.local import lengthened, load, mixed_problems
from autotune.results import StudyResult
from autotune.space import Candidate
from autotune.storage import read_studies
from benchmarks.common import fail_in_one_line, origin
from hardware.files import write_atomic
from runtime.bench import paired_ratio
from runtime.config import KernelConfig, require
from runtime.deployment import Deployment, load_deployment
from runtime.engine import generate
from runtime.policy import Settings, using


def follow(study: StudyResult, deployment: Deployment, rounds: int, wanted: str) -> dict[str, Any]:
    """One bucket: tokens per second of the deployment, of its settings given directly, and of the default."""
    work, about = effort(wanted), study.subject
    tuned = load(about.model)
    batch = about.workload.batch
    room = None if about.context is None else about.context - work.new_tokens
    problems = mixed_problems(-(-work.prompts // batch) * batch)
    prompts = [lengthened(p, tuned.model.config, tuned.tokenizer, room) for p in problems]
    require(
        hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12] == about.prompts,
        f"{study.name} was not made with the prompts of effort {wanted}: --effort names that of the tuning run",
    )
    rule = deployment.rule_for(batch, max(map(len, prompts)))
    assert study.decision is not None
    default = study.candidate(study.trial(study.decision.default_trial))

    def run(settings: Settings, kernels: KernelConfig | None = None) -> float:
        tokens, seconds, warm = 0, 0.0, False  # the first batch twice: other settings ran before
        with using(tuned.model, kernels):
            for place in (0, *range(0, len(prompts), batch)):
                part = prompts[place : place + batch]
                found = generate(tuned.model, part, settings, max_new_tokens=work.new_tokens, batch=batch)
                if warm:
                    tokens, seconds = tokens + sum(map(len, found.tokens)), seconds + found.decode_seconds
                warm = True
        return tokens / seconds

    runs: dict[str, Callable[[], float]] = {
        "deployment": lambda: run(deployment),
        "settings": lambda: run(*Candidate(rule.decoding, rule.kernels)),
        "default": lambda: run(*default),
    }
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + rounds):  # the first warms up
        for name in list(runs) if number % 2 else reversed(runs):  # there and back: none always follows the same
            found = runs[name]()
            if number:
                speeds[name].append(found)
    compared, kept = study.decision.comparison, study.decision.kept_default
    tuned_speed = (
        None if compared is None else compared.default_tokens_per_second if kept else compared.tokens_per_second
    )
    return {
        "study": study.name,
        "decoding": {"sampler": rule.decoding.sampler, "draft_tokens": rule.decoding.draft_tokens},
        "threads": rule.kernels.threads,
        "tokens_per_second": {name: statistics.median(found) for name, found in speeds.items()},
        "samples": speeds,
        "deployment_over_settings": paired_ratio(speeds["deployment"], speeds["settings"]),
        "deployment_over_default": paired_ratio(speeds["deployment"], speeds["default"]),
        "tokens_per_second_when_decided": tuned_speed,
    }


def main(arguments: list[str] | None = None) -> int:
    """Print a line per bucket; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.followed", description=__doc__)
    parser.add_argument("--study", required=True, help="folder, file or URL of a tuning run")
    parser.add_argument("--deployment", type=Path, required=True)
    parser.add_argument("--effort", default="standard", help="of the tuning run")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, help="a JSON file for all samples")
    chosen = parser.parse_args(arguments)
    deployment, studies = load_deployment(chosen.deployment), read_studies(chosen.study)
    rows = []
    for study in studies:
        row = follow(study, deployment, chosen.rounds, chosen.effort)
        rows.append(row)
        speeds, (ratio, low, high) = row["tokens_per_second"], row["deployment_over_settings"]
        gain = row["deployment_over_default"]
        print(
            f"{row['study']}: deployment {speeds['deployment']:.0f} tokens/s, over the same settings given directly "
            f"{ratio:.3f}x [{low:.3f}, {high:.3f}], over the default {gain[0]:.2f}x [{gain[1]:.2f}, {gain[2]:.2f}]; "
            f"when it was decided {row['tokens_per_second_when_decided'] or math.nan:.0f} tokens/s",
            flush=True,
        )
    if chosen.out:
        model = load(studies[0].subject.model)
        about = origin("benchmarks.followed", arguments, model.name, model.model)
        write_atomic(chosen.out, json.dumps({**about, "buckets": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
