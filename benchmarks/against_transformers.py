"""Our autoregressive decoding against `transformers` `generate`: same weights, same tokens, alternating rounds.

python -m benchmarks.against_transformers [--model zaya-nano] [--threads 1] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command, counting, fail_in_one_line
from hardware.files import UserError
from runtime.bench import identify, interleave, paired_ratio
from runtime.bench_generation import GenerationSample, sample_generation, task_prompts
from runtime.checkpoint import load_model, save_model
from runtime.config import DecodingConfig, require
from runtime.measurement import interval_name
from runtime.model.zaya import Zaya


def load_reference(model: Zaya) -> Any:
    """The same weights as a `transformers` model, through the published layout."""
    try:
        from transformers import ZayaForCausalLM
    except ImportError as error:
        raise UserError(
            "this benchmark needs the library it compares with: pip install 'transformers==5.17.*'"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        reference = ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # `from_pretrained` resets the skip expert's bias to -1 after loading it (ZayaPreTrainedModel._init_weights).
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith("biases")}, strict=False)
    return reference


@torch.inference_mode()
def reference_run(reference: Any, prompts: list[list[int]], new_tokens: int) -> GenerationSample:
    """Greedy generation of each prompt by its own call; the seconds hold the prefill."""
    outputs = []
    began = time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        found = reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        outputs.append(tuple(found[0, len(prompt) :].tolist()))
    tokens = sum(map(len, outputs))
    return GenerationSample(time.perf_counter() - began, tokens, tokens, (), 0.0, tuple(outputs))


def our_run(model: Zaya, prompts: list[list[int]], new_tokens: int) -> GenerationSample:
    """The same by our engine, timed from outside too: prefill, cache and counting are in the seconds."""
    began = time.perf_counter()
    sample = sample_generation(model, prompts, DecodingConfig(), batch=1, max_new_tokens=new_tokens)
    return replace(sample, seconds=time.perf_counter() - began)


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zaya-nano", help="a bundled checkpoint or a folder")
    parser.add_argument("--new-tokens", type=int, default=128, help="at most, per prompt")
    parser.add_argument("--prompts", type=int, default=3, help="prompts per round, each decoded alone (batch 1)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    chosen = parser.parse_args(arguments)
    require(chosen.threads >= 1, f"threads >= 1 must hold, but got {chosen.threads}")
    torch.set_num_threads(chosen.threads)
    model = load_model(chosen.model)
    reference = load_reference(model)
    prompts = task_prompts(model, chosen.prompts)
    runs = {
        "transformers": partial(reference_run, reference, prompts, chosen.new_tokens),
        "ours": partial(our_run, model, prompts, chosen.new_tokens),
    }
    found = interleave(runs, chosen.rounds, progress=counting((chosen.rounds + 1) * len(runs)))
    expected = found["transformers"][0]
    for name, samples in found.items():
        equal = all(sample.outputs == expected.outputs for sample in samples)
        require(equal, f"{name} did not produce the same greedy tokens: the times cannot be compared")
    seconds = {name: [sample.seconds for sample in samples] for name, samples in found.items()}
    ratio, low, high = paired_ratio(seconds["transformers"], seconds["ours"])
    rates = {name: statistics.median(s.tokens_per_second for s in samples) for name, samples in found.items()}
    identity = identify(model, chosen.model, command("benchmarks.against_transformers", arguments))
    result = {
        "command": identity.command,
        "model": chosen.model,
        "threads": chosen.threads,
        "tokens_per_round": expected.tokens,
        "tokens_per_second": rates,
        "speedup": ratio,
        "speedup_interval": [low, high],
        "seconds": seconds,
        "device": identity.device,
        "commit": identity.commit,
        "transformers": version("transformers"),
    }
    if chosen.json:
        print(json.dumps(result, indent=1))
        return 0
    print("| engine | tokens/s |\n| --- | ---: |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} |")
    print(
        f"\n{ratio:.2f}x ({interval_name(chosen.rounds)} {low:.2f}-{high:.2f}; {chosen.rounds} alternating rounds, "
        f"batch 1, {chosen.threads} threads, greedy, the same {expected.tokens} tokens a round; "
        f"{identity.device['cpu']})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
