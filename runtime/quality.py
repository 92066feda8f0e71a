"""How good outputs are: distance from the model's own autoregressive decoding, likelihood, and right answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.config import require
from runtime.conversion.tasks import Problem, check
from runtime.layout import causal
from runtime.logits import StoredLogits, kl_divergence, total_variation
from runtime.model.zaya import Zaya
from runtime.statistics import Estimate, ratio, repetition, wilson

BATCH = 16  # sequences per teacher-forced pass


@dataclass(frozen=True)
class Likeness:
    """Outputs against the causal distributions at their positions: means per token, with intervals over the outputs.

    Likelihood alone rewards loops. Tokens drawn from the model's own distribution have a likelihood near its entropy;
    a lower one says sharpened or repeated, and the repetition rate says which.
    """

    negative_log_likelihood: Estimate  # nats
    entropy: Estimate  # nats, of the causal distribution
    disagreement: Estimate  # share of tokens that are not its argmax
    repetition: Estimate | None  # share of 8-grams seen before in the same output; None where no output has one
    total_variation: Estimate | None  # from what the tokens were drawn from, where that was kept
    kl_divergence: Estimate | None  # nats, KL(drawn from || causal)
    temperature: float  # of both distributions in those two; likelihood and entropy are at temperature 1


def likeness(
    model: Zaya, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], stored: StoredLogits | None = None
) -> Likeness:
    """Judge outputs by a causal pass over each. stored: what their tokens were drawn from, request i being output i.

    Distances are at the temperature that was sampled at, so that they are those of the draws; of greedy outputs at
    temperature 1, as their draws differ by the argmax alone, which `disagreement` counts. Where a draw is also chosen
    by its confidence (denoising in several steps), the stored distribution is that ahead of the choice.
    """
    temperature = 1.0 if stored is None else stored.decoding.temperature or 1.0
    count = len(outputs)
    sums = torch.zeros(5, count, dtype=torch.float64)  # of NLL, entropy, disagreement, TV and KL, by output
    for i, logits, tokens in _teacher_forced(model, prompts, outputs):
        log_p = torch.log_softmax(logits.double(), -1)
        sums[0, i] = F.nll_loss(log_p, tokens, reduction="sum")
        sums[1, i] = -(log_p.exp() * log_p).sum()
        sums[2, i] = (logits.argmax(-1) != tokens).sum()
        if stored is not None:
            drawn = stored.of(i).to(logits.device)
            require(
                len(drawn) == len(tokens),
                f"the stored logits must have a row per token, but output {i} has {len(tokens)} and {len(drawn)} rows",
            )
            sums[3, i] = total_variation(drawn, logits, temperature).sum()
            sums[4, i] = kl_divergence(drawn, logits, temperature).sum()
    lengths = [len(o) for o in outputs]
    nats, entropy, wrong, variation, divergence = (ratio(row, lengths) for row in sums.tolist())
    repeated = [repetition(o) for o in outputs]
    return Likeness(
        nats,
        entropy,
        wrong,
        ratio([r for r, _ in repeated], [n for _, n in repeated]) if any(n for _, n in repeated) else None,
        variation if stored is not None else None,
        divergence if stored is not None else None,
        temperature,
    )


def disagreement(model: Zaya, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> float:
    """Share of output tokens that are not the argmax of the model's causal logits after the same prefix.

    It is 0 for greedy autoregressive or lossless outputs (up to ties within rounding, as a batched pass sums in
    another order), and the price in tokens of mixing or sampling otherwise.
    """
    wrong = sum(
        int((logits.argmax(-1) != tokens).sum()) for _, logits, tokens in _teacher_forced(model, prompts, outputs)
    )
    return wrong / sum(map(len, outputs))


def shortfalls(model: Zaya, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[list[float]]:
    """How far each output token's causal logit is below the best one, relative to the largest magnitude of them.

    0 for the argmax. A little above 0 a token lost a near tie, as rounding decides it; so `disagreement` can be told
    from that of a narrow type.
    """
    found: list[list[float]] = [[] for _ in outputs]
    for i, logits, tokens in _teacher_forced(model, prompts, outputs):
        short = logits.amax(-1) - logits.gather(-1, tokens[:, None]).squeeze(-1)
        found[i] = (short / logits.abs().amax(-1)).tolist()
    return found


def negative_log_likelihood(model: Zaya, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> float:
    """Mean over all output tokens of -log p(token | prefix) in nats, under the model's causal logits."""
    judged = _teacher_forced(model, prompts, outputs)
    nats = sum(float(F.cross_entropy(logits, tokens, reduction="sum")) for _, logits, tokens in judged)
    return nats / sum(map(len, outputs))


def exact_match(problems: Sequence[Problem], outputs: Sequence[str]) -> Estimate:
    """Share of problems whose generated text ends with the right answer."""
    return wilson(sum(right(problems, outputs)), len(problems))


def right(problems: Sequence[Problem], outputs: Sequence[str]) -> list[bool]:
    """Which generated texts end with the right answer."""
    return [check(p, text) for p, text in zip(problems, outputs, strict=True)]


def _teacher_forced(
    model: Zaya, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each output's index, its tokens [N] and the causal logits [N, V] that predict them; BATCH sequences a pass."""
    require(len(prompts) == len(outputs), f"one output per prompt must be given, but got {len(outputs)}")
    require(any(map(len, outputs)), "outputs must hold at least one token")
    for i, prompt in enumerate(prompts):
        require(len(prompt) >= 1, f"a prompt must have at least one token, but prompt {i} is empty")
    device = model.model.embed_tokens.weight.device
    order = sorted((i for i, o in enumerate(outputs) if o), key=lambda i: len(prompts[i]) + len(outputs[i]))
    for begin in range(0, len(order), BATCH):
        part = order[begin : begin + BATCH]
        rows = [[*prompts[i], *outputs[i]] for i in part]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        judged = []
        with torch.inference_mode():  # left before each yield, or it would hold for the caller's code too
            hidden = model.forward(ids, causal(width, str(device)))  # causality hides the padding behind a row
            for r, i in enumerate(part):
                first, last = len(prompts[i]), len(rows[r])
                judged.append((i, model.project(hidden[r, first - 1 : last - 1]), ids[r, first:last]))
        yield from judged
