"""Every greedy lossless sampler against greedy autoregressive decoding, token for token: 200 prompts of 128 tokens.

python -m benchmarks.equivalence [--model zaya-nano] [--samplers two_forward,...] [--batch 1,7] [--draft-tokens 4,16]

Exits with 1 when any token differs. Three quarters of the prompts are held-out tasks, the others source text. Every
prompt is decoded to the full length, beyond its end-of-sequence token, because loops and nonsense must agree too.
Samplers other than two_forward, which costs the least, decode the first `--prompts-of-others`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.common import counting, fail_in_one_line, origin
from hardware.files import known
from perfmodel.steps import title
from runtime.bench_generation import task_prompts
from runtime.checkpoint import load_model
from runtime.config import SAMPLER_NAMES, DecodingConfig, require
from runtime.conversion.data import source_prompts
from runtime.engine import generate
from runtime.model.zaya import Zaya
from runtime.tokenizer import BOS, VOCABULARY


@dataclass(frozen=True)
class Difference:
    """The first token of a prompt's output that is not the autoregressive one."""

    prompt: int
    position: int
    expected: int
    found: int
    margin: float  # of the two tokens' causal logits; near 0 it is a tie within rounding


@dataclass(frozen=True)
class Comparison:
    """One way of decoding against autoregressive decoding at the same batch."""

    setting: str
    batch: int
    draft_tokens: int
    prompts: int
    new_tokens: int
    acceptance_length: float
    seconds: float
    different: list[Difference]


def prompts_for(model: Zaya, count: int, seed: int = 0) -> list[list[int]]:
    """Held-out tasks, and for every fourth prompt 64 bytes of held-out source; random ids for another vocabulary."""
    prompts = task_prompts(model, count, seed=seed)
    if model.config.vocab_size == VOCABULARY:
        prompts[3::4] = [[BOS, *text] for text, _ in source_prompts(len(prompts[3::4]), 64, seed)]
    return prompts


def autoregressive(model: Zaya, prompts: Sequence[Sequence[int]], *, batch: int, new_tokens: int) -> list[list[int]]:
    """Greedy outputs, the prompts taken `batch` at a time."""
    return _decode(model, prompts, DecodingConfig(), batch, new_tokens, lambda done: None)[0]


def compare(
    model: Zaya,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    *,
    batch: int,
    new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Decode as `decoding` says and find the first difference from `expected` in each output."""
    began = time.perf_counter()
    found, steps = _decode(model, prompts, decoding, batch, new_tokens, progress)
    different = []
    for index, (right, mine) in enumerate(zip(expected, found, strict=True)):
        if right != mine:
            at = next(i for i, (a, b) in enumerate(zip(right, mine, strict=True)) if a != b)
            with torch.no_grad():
                logits = model.logits(torch.tensor([[*prompts[index], *right[:at]]]))[0, -1]
            margin = float(logits[right[at]] - logits[mine[at]])
            different.append(Difference(index, at, right[at], mine[at], margin))
    return Comparison(
        title(decoding),
        batch,
        decoding.draft_tokens,
        len(prompts),
        new_tokens,
        sum(map(len, found)) / steps,
        time.perf_counter() - began,
        different,
    )


def settings_of(sampler: str, draft_tokens: int) -> list[DecodingConfig]:
    """The lossless settings of a sampler that are compared at this K. UserError for a sampler that drafts nothing."""
    k, steps = draft_tokens, min(4, draft_tokens)
    few = tuple(level for level in (0, 4, 7, 11) if level <= k)
    blocks = {"denoising_steps": k, "confidence_threshold": 0.9}
    found = {
        "two_forward": [DecodingConfig("two_forward", k, anchor_draft=anchored) for anchored in (False, True)],
        "single_forward": [DecodingConfig("single_forward", k, proposal_levels=levels) for levels in (None, few)],
        "denoising": [
            DecodingConfig("denoising", k, verify=True, **changes)  # type: ignore[arg-type]
            for changes in ({"denoising_steps": 2 if k > 1 else 1}, {"denoising_steps": steps}, blocks)
        ],
    }
    if sampler not in found:
        raise known("sampler to compare", sampler, found)
    return found[sampler]


def _decode(
    model: Zaya,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    batch: int,
    new_tokens: int,
    progress: Callable[[int], None],
) -> tuple[list[list[int]], int]:
    outputs: list[list[int]] = []
    steps = 0
    for begin in range(0, len(prompts), batch):
        result = generate(model, prompts[begin : begin + batch], decoding, max_new_tokens=new_tokens, stop_tokens=())
        outputs += result.tokens
        steps += sum(result.steps)
        progress(len(outputs))
    return outputs, steps


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    chosen = _arguments(arguments)
    for name in ("prompts", "prompts_of_others", "new_tokens", "threads"):
        require(getattr(chosen, name) >= 1, f"{name} >= 1 must hold, but got {getattr(chosen, name)}")
    require(min(chosen.batch) >= 1, f"batch >= 1 must hold, but got {min(chosen.batch)}")
    ways = [way for name in chosen.samplers for k in chosen.draft_tokens for way in settings_of(name, k)]
    torch.set_num_threads(chosen.threads)
    model = load_model(chosen.model)
    prompts = prompts_for(model, chosen.prompts, chosen.seed)
    results = []
    for batch in chosen.batch:
        print(f"batch {batch}: autoregressive", file=sys.stderr)
        expected = autoregressive(model, prompts, batch=batch, new_tokens=chosen.new_tokens)
        for way in ways:
            count = len(prompts) if way.sampler == "two_forward" else min(len(prompts), chosen.prompts_of_others)
            print(f"batch {batch}: {title(way)}, K = {way.draft_tokens}", file=sys.stderr)
            found = compare(
                model,
                prompts[:count],
                expected[:count],
                way,
                batch=batch,
                new_tokens=chosen.new_tokens,
                progress=counting(count),
            )
            print(f"{len(found.different)} prompts differ", file=sys.stderr)  # kept, should the run be cut short
            results.append(found)
    where = origin("benchmarks.equivalence", arguments, chosen.model, model)
    print(json.dumps({**where, "results": [asdict(r) for r in results]}) if chosen.json else _table(results))
    return 1 if any(result.different for result in results) else 0


def _table(results: Sequence[Comparison]) -> str:
    width = max(len(r.setting) for r in results)
    lines = [f"batch  K  {'setting':{width}}  prompts x tokens  tokens a step  seconds  prompts that differ"]
    for r in results:
        lines.append(
            f"{r.batch:5} {r.draft_tokens:2}  {r.setting:{width}}  {f'{r.prompts} x {r.new_tokens}':16}"
            f"  {r.acceptance_length:13.2f}  {r.seconds:7.1f}  {len(r.different)}"
        )
        lines += [
            f"  prompt {d.prompt}, token {d.position}: {d.expected} expected, {d.found} found, margin {d.margin:.2g}"
            for d in r.different
        ]
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zaya-nano", help="a checkpoint's name or folder")
    parser.add_argument(
        "--samplers",
        type=lambda text: text.split(","),
        default=list(SAMPLER_NAMES[1:]),
        help="those to compare, with commas between",
    )
    parser.add_argument("--prompts", type=int, default=200, help="of two_forward, and at most of the others")
    parser.add_argument("--prompts-of-others", type=int, default=80)
    parser.add_argument("--new-tokens", type=int, default=128, help="new tokens per prompt")
    parser.add_argument("--batch", type=_numbers, default=[1, 7], help="batch sizes, with commas between")
    parser.add_argument("--draft-tokens", type=_numbers, default=[4, 16], help="values of K, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
