"""A drafting sampler against our own autoregressive decoding on the verifiable tasks, in alternating rounds.

python -m benchmarks.speedup [--deployment FILE | --sampler NAME --draft-tokens K ...] [--batch 1,8] [--out FILE.jsonl]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command, counting, fail_in_one_line, origin
from hardware.files import plain
from perfmodel.steps import title
from runtime.bench import Identity, identify, interleave, paired_ratio
from runtime.bench_generation import (
    GenerationSample,
    fair_count,
    generation_record,
    sample_generation,
    task_prompts,
)
from runtime.checkpoint import load_model
from runtime.config import EXPERT_MODES, SAMPLER_NAMES, DecodingConfig, KernelConfig, require
from runtime.deployment import load_deployment, rule_for
from runtime.measurement import Measurement, append_jsonl, interval_name
from runtime.model.zaya import Zaya
from runtime.policy import rules_of
from runtime.quality import disagreement


def compare(
    model: Zaya,
    identity: Identity,
    prompts: list[list[int]],
    decoding: DecodingConfig,
    kernels: KernelConfig | None,
    batch: int,
    *,
    new_tokens: int,
    rounds: int,
    seed: int,
) -> tuple[list[Measurement], dict[str, Any]]:
    """Records of all ways, and what is printed of them. Every round decodes the same prompts in every way.

    The baseline is autoregressive decoding with the default kernels or with the tuned ones, whichever was faster.
    """
    baseline = decoding.autoregressive
    ways: dict[str, tuple[DecodingConfig, KernelConfig | None]] = {
        "autoregressive": (baseline, None),
        decoding.sampler: (decoding, kernels),
    }
    if kernels is not None:
        ways["autoregressive, tuned kernels"] = (baseline, kernels)
    settings: dict[str, Any] = {"batch": batch, "max_new_tokens": new_tokens}

    def run(name: str) -> GenerationSample:
        return sample_generation(model, prompts, ways[name][0], kernels=ways[name][1], seed=seed, **settings)

    print(f"batch {batch}: {len(ways)} ways, {rounds} rounds", file=sys.stderr)
    runs = {name: partial(run, name) for name in ways}
    samples = interleave(runs, rounds, progress=counting(len(ways) * (rounds + 1)))
    rates = {name: [sample.tokens_per_second for sample in found] for name, found in samples.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max((name for name in ways if name != decoding.sampler), key=medians.__getitem__)
    ratio, low, high = paired_ratio(rates[decoding.sampler], rates[best])
    outputs = {name: found[0].outputs for name, found in samples.items()}
    quality = {"speedup": ratio, "speedup_low": low, "speedup_high": high}
    if decoding.temperature == 0:
        quality["disagreement"] = disagreement(model, prompts, outputs[decoding.sampler])
    records = [
        generation_record(
            model,
            identity,
            prompts,
            way,
            samples[name],
            kernels=kernel,
            quality=quality if name == decoding.sampler else {},
            **settings,
        )
        for name, (way, kernel) in ways.items()
    ]
    tuned = records[list(ways).index(decoding.sampler)]
    return records, {
        "batch": batch,
        "setting": title(decoding),
        "decoding": plain(decoding),
        "kernels": plain(tuned.kernels),
        "baseline": best,
        "tokens_per_second": medians,
        "acceptance_length": tuned.acceptance_length,
        "experts_per_layer": {name: record.experts_per_layer for name, record in zip(ways, records, strict=True)},
        "equal_to_baseline": outputs[decoding.sampler] == outputs[best],
        **quality,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    chosen = _arguments(arguments)
    require(chosen.threads >= 1, f"threads >= 1 must hold, but got {chosen.threads}")
    torch.set_num_threads(chosen.threads)
    model = load_model(chosen.model)
    identity = identify(model, chosen.model, command("benchmarks.speedup", arguments))
    deployment = load_deployment(chosen.deployment) if chosen.deployment else None
    results = []
    asked = DecodingConfig(
        chosen.sampler,
        draft_tokens=chosen.draft_tokens,
        mixing_weight=chosen.mixing_weight,
        temperature=chosen.temperature,
        anchor_draft=chosen.anchor_draft,
        proposal_levels=chosen.levels,
        denoising_steps=chosen.steps,
        confidence_threshold=chosen.threshold,
        verify=chosen.verify,
    )
    for batch in chosen.batch:
        prompts = task_prompts(model, fair_count(chosen.prompts, batch), seed=chosen.seed)
        decoding = asked
        kernels = KernelConfig({1_000_000: chosen.experts}) if chosen.experts else None
        if deployment is not None:
            rule = rule_for(rules_of(model, deployment), batch, max(map(len, prompts)))
            decoding, kernels = rule.decoding, rule.kernels
            if not decoding.drafts:
                print(f"batch {batch}: the deployment decodes autoregressively, nothing to compare", file=sys.stderr)
                continue
        records, result = compare(
            model,
            identity,
            prompts,
            decoding,
            kernels,
            batch,
            new_tokens=chosen.new_tokens,
            rounds=chosen.rounds,
            seed=chosen.seed,
        )
        results.append(result)
        if chosen.out is not None:
            for record in records:
                append_jsonl(chosen.out, record)
    if chosen.json:
        where = origin("benchmarks.speedup", arguments, chosen.model, model)
        print(json.dumps({**where, "rounds": chosen.rounds, "results": results}, indent=1))
        return 0
    interval = interval_name(chosen.rounds)
    print(f"| batch | setting | K | w | baseline tokens/s | tokens/s | tokens a step | speedup ({interval}) |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for found in results:
        rates, settings = found["tokens_per_second"], found["decoding"]
        print(
            f"| {found['batch']} | {found['setting']} | {settings['draft_tokens']} | {settings['mixing_weight']:g} "
            f"| {rates[found['baseline']]:.1f} | {rates[settings['sampler']]:.1f} | {found['acceptance_length']:.2f} "
            f"| {found['speedup']:.2f} ({found['speedup_low']:.2f}-{found['speedup_high']:.2f}) |"
        )
    equal = all(found["equal_to_baseline"] for found in results)
    print(
        f"\n{chosen.rounds} alternating rounds of held-out problems on {identity.device['cpu']}; "
        f"outputs {'equal' if equal else 'differ from'} the baseline's."
    )
    return 0


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zaya-nano", help="a bundled checkpoint or a folder")
    parser.add_argument("--deployment", type=Path, help="a tuned deployment.yaml, instead of the sampler's options")
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--sampler", choices=SAMPLER_NAMES[1:], default="two_forward")
    parser.add_argument("--draft-tokens", type=int, default=16)
    parser.add_argument(
        "--levels",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        help="of single_forward, with commas between (default: all)",
    )
    parser.add_argument("--steps", type=int, default=1, help="most forwards that fill a denoising block")
    parser.add_argument("--threshold", type=float, help="probability from which denoising decides a token early")
    parser.add_argument("--verify", action="store_true", help="verify the denoised block")
    parser.add_argument("--mixing-weight", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--anchor-draft", action="store_true")
    parser.add_argument("--experts", choices=EXPERT_MODES, help="how the sampler's forwards run the experts")
    parser.add_argument("--prompts", type=int, default=10, help="per round at least; families and batches stay even")
    parser.add_argument("--new-tokens", type=int, default=150, help="at most, per prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSONL file for the records")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
