"""How good outputs are: distance from the model's own autoregressive decoding, likelihood, and right answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.config import require
from runtime.conversion.tasks import Problem, check
from runtime.layout import causal
from runtime.model.zaya import Zaya

BATCH = 16  # sequences per teacher-forced pass


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` problems with a 95% interval."""

    value: float
    low: float
    high: float
    count: int


def disagreement(model: Zaya, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> float:
    """Share of output tokens that are not the argmax of the model's causal logits after the same prefix.

    It is 0 for greedy autoregressive or lossless outputs (up to ties within rounding, as a batched pass sums in
    another order), and the price in tokens of mixing or sampling otherwise.
    """
    wrong = total = 0
    for logits, tokens in _teacher_forced(model, prompts, outputs):
        wrong += int((logits.argmax(-1) != tokens).sum())
        total += tokens.numel()
    return wrong / total


def negative_log_likelihood(model: Zaya, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> float:
    """Mean over all output tokens of -log p(token | prefix) in nats, under the model's causal logits."""
    nats, total = 0.0, 0
    for logits, tokens in _teacher_forced(model, prompts, outputs):
        nats += float(F.cross_entropy(logits, tokens, reduction="sum"))
        total += tokens.numel()
    return nats / total


def exact_match(problems: Sequence[Problem], outputs: Sequence[str]) -> Estimate:
    """Share of problems whose generated text ends with the right answer."""
    return wilson(sum(check(p, text) for p, text in zip(problems, outputs, strict=True)), len(problems))


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    require(trials >= 1, f"a proportion needs at least one trial, but got {trials}")
    require(0 <= successes <= trials, f"0 <= successes <= trials must hold, but got {successes} of {trials}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), trials)


def bootstrap(
    statistic: Callable[[list[int]], float], count: int, *, confidence: float = 0.95, draws: int = 1000, seed: int = 0
) -> Estimate:
    """A statistic of `count` problems with a seeded percentile bootstrap interval; it is given indices of problems."""
    require(count >= 1, f"a statistic needs at least one problem, but got {count}")
    rng = random.Random(seed)
    values = sorted(statistic(rng.choices(range(count), k=count)) for _ in range(draws))
    tail = (1 - confidence) / 2
    low, high = values[int(tail * (draws - 1))], values[round((1 - tail) * (draws - 1))]
    return Estimate(statistic(list(range(count))), low, high, count)


def _teacher_forced(
    model: Zaya, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal logits [N, V] that predict the output tokens [N], a causal pass per BATCH sequences."""
    require(len(prompts) == len(outputs), f"one output per prompt must be given, but got {len(outputs)}")
    require(any(map(len, outputs)), "outputs must hold at least one token")
    for i, prompt in enumerate(prompts):
        require(len(prompt) >= 1, f"a prompt must have at least one token, but prompt {i} is empty")
    device = model.model.embed_tokens.weight.device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(outputs[i]))
    for begin in range(0, len(order), BATCH):
        part = [([*prompts[i], *outputs[i]], len(prompts[i])) for i in order[begin : begin + BATCH]]
        width = max(len(row) for row, _ in part)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in part], device=device)
        rows = torch.tensor([r for r, (row, n) in enumerate(part) for _ in range(n, len(row))], device=device)
        places = torch.tensor([p for row, n in part for p in range(n, len(row))], device=device)
        if not len(rows):
            continue
        with torch.inference_mode():
            hidden = model.forward(ids, causal(width, str(device)))  # causality hides the padding behind a row
            logits = model.project(hidden[rows, places - 1])
        yield logits, ids[rows, places]
