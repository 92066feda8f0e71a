"""Every engine against the eager one: the same tokens in float32; in bfloat16, logits no worse than eager's.

python -m benchmarks.engine_equality [--model zaya-nano] [--engines lean] [--dtypes float32,bfloat16] [--json]

Tokens: every sampler, greedy and sampled, the same prompts and seed. Logits: both engines follow the same text with
their own cache, a token and a block of drafts at a time; their distance is a relative norm, and what eager float32 says
of the same text tells how far from it each of them is. A position that takes another expert because two of them are
within rounding has other logits for good reason: it is counted, and left out of the distance. Exits with 1 when a
float32 token differs, or when an engine's logits are further from float32 than `--times` eager's are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.common import fail_in_one_line, origin
from benchmarks.equivalence import prompts_for
from perfmodel.steps import title
from runtime.checkpoint import load_model
from runtime.config import DTYPE_BYTES, DecodingConfig, require
from runtime.engine import generate
from runtime.engines import obstacle, use_engine
from runtime.layout import causal
from runtime.model.zaya import Zaya


@dataclass(frozen=True)
class Tokens:
    """One way of decoding with an engine and with the eager one. first: prompt and place of each first difference."""

    engine: str
    dtype: str
    setting: str
    prompts: int
    new_tokens: int
    first: list[tuple[int, int]]


@dataclass(frozen=True)
class Logits:
    """An engine's logits behind the tokens of a given text.

    error: relative norm of the distance to eager's, where both take the same experts in every layer; the others, where
    they take float32's. rerouted: positions that take another expert than in float32, in some layer.
    """

    engine: str
    dtype: str
    slots: int  # of a forward
    positions: int
    differing_argmaxes: int  # of the engine and eager, at all positions
    error: float
    error_to_float32: float
    eager_error_to_float32: float
    rerouted: int
    eager_rerouted: int


@dataclass(frozen=True)
class Followed:
    """Logits fp32 [B, T, V] and chosen experts [layers, B, T] of one engine along a text."""

    logits: Tensor
    routes: Tensor


def settings(draft_tokens: int) -> list[DecodingConfig]:
    """What is decoded: every sampler, greedy and sampled."""
    k, few = draft_tokens, tuple(range(0, draft_tokens + 1, 2))
    return [
        DecodingConfig(),
        DecodingConfig(temperature=0.8),
        DecodingConfig("two_forward", k),
        DecodingConfig("two_forward", k, 0.7, 0.8, 0.8, anchor_draft=True),
        DecodingConfig("single_forward", k),
        DecodingConfig("single_forward", k, 1.0, 0.8, 0.8, proposal_levels=few),
        DecodingConfig("denoising", k, denoising_steps=min(2, k), verify=True),
        DecodingConfig("denoising", k, denoising_steps=min(2, k), confidence_threshold=0.9),
    ]


def compare_tokens(
    model: Zaya, engine: str, prompts: Sequence[Sequence[int]], decoding: DecodingConfig, new_tokens: int
) -> Tokens:
    """Decode all prompts in one batch, beyond the end-of-sequence token, because nonsense must agree too."""
    found = {}
    for name in ("eager", engine):
        use_engine(model, name)
        found[name] = generate(model, prompts, decoding, max_new_tokens=new_tokens, stop_tokens=(), seed=1).tokens
    first = []
    for index, (right, mine) in enumerate(zip(found["eager"], found[engine], strict=True)):
        if right != mine:
            first.append((index, next(i for i, (a, b) in enumerate(zip(right, mine, strict=True)) if a != b)))
    return Tokens(engine, _dtype(model), described(decoding), len(prompts), new_tokens, first)


@torch.no_grad()
def follow(model: Zaya, engine: str, text: Tensor, prefix: int, slots: int) -> Followed:
    """Let an engine read int64 `text` [B, prefix + T], the prefix at once and then `slots` tokens at a time."""
    use_engine(model, engine)
    batch, length = text.shape
    device = str(text.device)
    cache = model.new_cache(batch, length, slots)
    model.forward(text[:, :prefix], causal(prefix, device), cache, counts=[prefix] * batch)
    cache.advance([prefix] * batch)
    logits, routes = [], []
    for begin in range(prefix, length, slots):
        part = text[:, begin : begin + slots]
        width = part.shape[1]
        hidden, chosen = model.run(part, causal(width, device), cache)
        logits.append(model.project(hidden).float())
        routes.append(chosen.view(-1, batch, width))
        cache.advance([width] * batch)
    return Followed(torch.cat(logits, 1), torch.cat(routes, 2))


def compare_logits(model: Zaya, exact: Zaya, engine: str, text: Tensor, prefix: int, slots: int) -> Logits:
    """How far an engine is from eager on the same text, and both from `exact`, the same model in float32."""
    truth = follow(exact, "eager", text, prefix, slots)
    eager, found = (follow(model, name, text, prefix, slots) for name in ("eager", engine))
    return Logits(
        engine,
        _dtype(model),
        slots,
        text.shape[0] * (text.shape[1] - prefix),
        int((found.logits.argmax(-1) != eager.logits.argmax(-1)).sum()),
        _distance(found, eager),
        _distance(found, truth),
        _distance(eager, truth),
        int(_rerouted(found, truth).sum()),
        int(_rerouted(eager, truth).sum()),
    )


def _rerouted(found: Followed, expected: Followed) -> Tensor:
    return (found.routes != expected.routes).any(0)  # [B, T]


def _distance(found: Followed, expected: Followed) -> float:
    same = ~_rerouted(found, expected)
    return float((found.logits[same] - expected.logits[same]).norm() / expected.logits[same].norm())


def _dtype(model: Zaya) -> str:
    return str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")


def described(decoding: DecodingConfig) -> str:
    """The settings in a few words."""
    warm = f", temperature {decoding.temperature:g}" if decoding.temperature else ""
    return f"{title(decoding)}, K = {decoding.draft_tokens}{warm}" if decoding.drafts else f"{title(decoding)}{warm}"


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    chosen = _arguments(arguments)
    for name in ("prompts", "new_tokens", "draft_tokens", "threads"):
        require(getattr(chosen, name) >= 1, f"{name} >= 1 must hold, but got {getattr(chosen, name)}")
    torch.set_num_threads(chosen.threads)
    exact = load_model(chosen.model, device=chosen.device)
    prompts = prompts_for(exact, chosen.prompts, chosen.seed)
    use_engine(exact, "eager")
    written = generate(exact, prompts, DecodingConfig(), max_new_tokens=chosen.new_tokens, stop_tokens=()).tokens
    prefix = min(map(len, prompts))
    rows = [[*prompt, *new][: prefix + chosen.new_tokens] for prompt, new in zip(prompts, written, strict=True)]
    text = torch.tensor(rows, device=chosen.device)
    tokens: list[Tokens] = []
    logits: list[Logits] = []
    for dtype in chosen.dtypes:
        model = load_model(chosen.model, device=chosen.device, dtype=dtype)
        for engine in chosen.engines or _fastest(model):
            use_engine(model, engine)  # one that cannot run says so before anything is decoded
            for decoding in settings(chosen.draft_tokens):
                print(f"{dtype}, {engine}: {described(decoding)}", file=sys.stderr)
                tokens.append(compare_tokens(model, engine, prompts, decoding, chosen.new_tokens))
            for slots in (1, chosen.draft_tokens + 1):
                print(f"{dtype}, {engine}: logits of {slots} slots", file=sys.stderr)
                logits.append(compare_logits(model, exact, engine, text, prefix, slots))
    where = origin("benchmarks.engine_equality", arguments, chosen.model, exact)
    document = {**where, "tokens": [asdict(t) for t in tokens], "logits": [asdict(x) for x in logits]}
    print(json.dumps(document) if chosen.json else _table(tokens, logits))
    differ = any(t.first for t in tokens if t.dtype == "float32")
    return 1 if differ or any(_worse(x, chosen.times) for x in logits) else 0


def _fastest(model: Zaya) -> list[str]:
    """The engine that runs by default, when it is not the eager one."""
    return [engine for engine in ("graphs", "lean") if obstacle(model, engine) is None][:1]


def _worse(logits: Logits, times: float) -> bool:
    allowed = 1e-5 if logits.dtype == "float32" else times * logits.eager_error_to_float32
    return logits.error_to_float32 > allowed


def _table(tokens: Sequence[Tokens], logits: Sequence[Logits]) -> str:
    lines = ["engine    dtype     prompts x tokens  prompts that differ  setting"]
    for t in tokens:
        asked = f"{t.prompts} x {t.new_tokens}"
        lines.append(f"{t.engine:8}  {t.dtype:8}  {asked:16}  {len(t.first):19}  {t.setting}")
    titles = "engine    dtype     slots  positions  argmaxes differ  to eager  to float32 (eager's)  rerouted (eager's)"
    lines += ["", titles]
    for x in logits:
        exact = f"{x.error_to_float32:.1e} ({x.eager_error_to_float32:.1e})"
        rerouted = f"{x.rerouted} ({x.eager_rerouted})"
        lines.append(
            f"{x.engine:8}  {x.dtype:8}  {x.slots:5}  {x.positions:9}  {x.differing_argmaxes:15}  {x.error:8.1e}"
            f"  {exact:20}  {rerouted}"
        )
    return "\n".join(lines)


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    require(set(names) <= set(DTYPE_BYTES), f"dtypes must be among {', '.join(DTYPE_BYTES)}, but are {text}")
    return names


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zaya-nano", help="a checkpoint's name or folder")
    parser.add_argument("--engines", type=lambda text: text.split(","), help="default: the one that auto chooses")
    parser.add_argument("--dtypes", type=_dtypes, default=["float32", "bfloat16"], help="with commas between")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=16, help="decoded as one batch")
    parser.add_argument("--new-tokens", type=int, default=96, help="new tokens per prompt")
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument("--times", type=float, default=1.5, help="an engine's error over eager's, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the tables")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
