"""Arguments to try drawing and judging on, and how far what was found is from what the logits allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.kernels.problem import Problem
from runtime.samplers.acceptance import Accepted, Draft, draft_probabilities, draw, mix

outputs_draw = ("token",)


def inputs_draw(problem: Problem, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Rows of logits, most of them warm: of all slots, or of the drafts behind an anchor."""
    random, width = _generator(device, seed), _width(problem)
    rows = max(1, width - 1)
    temperatures = torch.full((rows,), 0.8, device=device)
    temperatures[1:2] = 0
    logits = 3 * torch.randn(problem.batch, rows, problem.config.vocab_size, generator=random, device=device)
    uniform = torch.rand(problem.batch, rows, generator=random, device=device, dtype=torch.float64)
    warm = problem.kind != "draft"
    return {
        "logits": logits.to(dtype),
        "temperatures": temperatures if warm else torch.zeros_like(temperatures),
        "uniform": uniform if warm else None,
    }


def errors_draw(arguments: dict[str, Any], expected: Tensor, found: Tensor) -> dict[str, float]:
    """How far the uniform lies outside of the found token's share; of a cold row, how far it is from the best."""
    logits, temperatures, uniform = (arguments[name] for name in ("logits", "temperatures", "uniform"))
    worst = 0.0
    for row in range(logits.shape[1]):
        values, tokens = logits[:, row].double(), found[:, row]
        if uniform is None or temperatures[row] == 0:
            worst = max(worst, _short_of_best(values, tokens))
        else:
            worst = max(worst, _outside(torch.softmax(values / temperatures[row], -1), tokens, uniform[:, row]))
    return {"token": worst}


def inputs_verify(problem: Problem, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Drafts of which some pass: warm ones for causal slots, argmax ones, mixed, for the others; greedy ones for
    [anchor, masks], and of differing lengths for single_forward."""
    random, width = _generator(device, seed), max(2, _width(problem))
    batch, vocabulary, warm = problem.batch, problem.config.vocab_size, problem.kind == "causal"
    logits = 3 * torch.randn(batch, width, vocabulary, generator=random, device=device)
    noise = torch.randn(batch, width - 1, vocabulary, generator=random, device=device)
    drafted = (logits[:, :-1] + noise / 2).to(dtype)
    temperatures = torch.full((width - 1,), 0.9 if warm else 0.0, device=device)
    temperatures[1:2] = 0
    uniform = torch.rand(batch, 2 * width, generator=random, device=device, dtype=torch.float64)
    tokens = torch.zeros(batch, width - 1, dtype=torch.int64, device=device)
    if torch.device(device).type != "meta":
        tokens = draw(drafted, temperatures, uniform[:, width + 1 :] if warm else None)
    lengths = None
    if problem.kind == "single":
        lengths = torch.arange(batch, device=device) % width
    return {
        "ar_logits": logits.to(dtype),
        "draft": Draft(tokens, drafted, temperatures, lengths),
        "temperature": 0.0 if problem.kind == "draft" else 0.7,
        "mixing_weight": 1.0 if warm else 0.6,
        "uniform": None if problem.kind == "draft" else uniform[:, :width].contiguous(),
    }


def errors_verify(arguments: dict[str, Any], expected: Accepted, found: Accepted) -> dict[str, float]:
    """count: the furthest that a decision is from its border, of the drafts decided otherwise than in float64. token:
    as of a draw, from the row that the found count names."""
    draft, temperature = arguments["draft"], arguments["temperature"]
    batch, drafts = draft.tokens.shape
    last = torch.full_like(found.count, drafts) if draft.lengths is None else draft.lengths
    place = torch.arange(batch, device=found.count.device)
    if not bool(((found.count >= 0) & (found.count <= last)).all()):
        return {"count": float("inf"), "token": float("inf")}
    target = mix(arguments["ar_logits"], draft, arguments["mixing_weight"])
    wrong = 0.0
    for slot in range(drafts):
        values, tokens = target[:, slot].double(), draft.tokens[:, slot]
        if temperature == 0:
            passes, margin = values.argmax(-1) == tokens, values.amax(-1) - values[place, tokens]
        else:
            p = torch.softmax(values / temperature, -1)[place, tokens]
            part = Draft(draft.tokens[:, slot : slot + 1], draft.logits[:, slot : slot + 1].double(),
                         draft.temperatures[slot : slot + 1])  # fmt: skip
            limit = arguments["uniform"][:, slot] * draft_probabilities(part)[place, 0, tokens]
            passes, margin = limit < p, (limit - p).abs() / torch.maximum(limit, p)
        passed = found.count > slot
        judged = (found.count >= slot) & (slot < last) & (passed != passes)
        wrong = max(wrong, float(torch.where(judged, margin, 0.0).max()))
    values = target[place, found.count].double()
    if temperature == 0:
        return {"count": wrong, "token": _short_of_best(values, found.token)}
    weights = torch.softmax(values / temperature, -1)
    slot = found.count.clamp_max(drafts - 1)
    warmth = draft.temperatures[slot][:, None, None]
    q = torch.softmax(draft.logits[place, slot].double() / torch.where(warmth > 0, warmth, 1.0)[:, 0], -1)
    certain = torch.zeros_like(q).scatter_(1, draft.tokens[place, slot][:, None], 1.0)
    left = (weights - torch.where(warmth[:, 0] > 0, q, certain)).clamp_min(0)
    weights = torch.where((found.count == last)[:, None], weights, left)
    return {"count": wrong, "token": _outside(weights, found.token, arguments["uniform"][:, drafts])}


def _short_of_best(values: Tensor, tokens: Tensor) -> float:
    """How much less than the largest of values [B, V] the tokens' own are, of the largest."""
    best = values.amax(-1)
    return float(((best - values.gather(1, tokens[:, None])[:, 0]) / best.abs()).max())


def _outside(weights: Tensor, tokens: Tensor, uniform: Tensor) -> float:
    """How far uniform [B] lies outside of the tokens' shares of weights [B, V]; infinite for a share of nothing."""
    above = weights.cumsum(-1)
    above = above / above[:, -1:]
    high = above.gather(1, tokens[:, None])[:, 0]
    low = above.gather(1, (tokens - 1).clamp_min(0)[:, None])[:, 0]
    low = torch.where(tokens > 0, low, 0.0)
    outside = torch.maximum(low - uniform, uniform - high).clamp_min(0)
    impossible = weights.gather(1, tokens[:, None])[:, 0] <= 0
    return float(torch.where(impossible, torch.inf, outside).max())


def _width(problem: Problem) -> int:
    """Slots whose logits are judged: of single_forward the verified ones."""
    return problem.slots // (1 + len(problem.levels))


def _generator(device: torch.device | str, seed: int) -> torch.Generator | None:
    """None where nothing is drawn."""
    return None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)
