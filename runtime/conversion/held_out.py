"""Evaluations during a training run: losses on fixed held-out batches, acceptance length and right answers."""

from __future__ import annotations

from itertools import islice
from typing import TypeAlias

import numpy as np
import torch

from runtime.config import DecodingConfig
from runtime.conversion.data import Batch, Encoding, evaluation_problems, training_batches
from runtime.conversion.objective import block_starts, conversion_loss, label_counts, next_token_loss
from runtime.conversion.recipe import Stage
from runtime.conversion.tasks import FAMILIES, check
from runtime.conversion.token_file import TokenFile
from runtime.engine import generate
from runtime.model.zaya import Zaya
from runtime.tokenizer import Tokenizer

ROWS = 8  # per kind of text
NEW_TOKENS = 150  # longest answer to a task
PROMPT_TOKENS = 64  # of a held-out row of a token file, continued by as many
SEED = 0  # the same data in every run, so that runs compare
_DRAFT_TOKENS = 16

Texts: TypeAlias = tuple[Tokenizer, Encoding]  # how the built-in text becomes tokens, and tokens text


def evaluate_held_out(model: Zaya, stage: Stage, texts: Texts | None) -> dict[str, float]:
    """Mean losses in nats per label, by kind of text; and of greedy decoding, tokens per step and right answers.

    texts: None for a stage that trains on a file. A conversion is decoded by
    two_forward with K = 16, everything else autoregressively (one token a step, so no acceptance length). The model
    is frozen meanwhile and can be trained on after; no random state is shared with the training.
    """
    model.freeze()
    try:
        found: dict[str, float] = {}
        kinds = _batches(model, stage, texts)
        for kind, batch in kinds.items():
            found |= {f"{name}_{kind}": loss for name, loss in _losses(model, stage, batch).items()}
        return found | _decoded(model, stage, texts, kinds)
    finally:
        model.train().requires_grad_(True)


def _batches(model: Zaya, stage: Stage, texts: Texts | None) -> dict[str, Batch]:
    length = stage.length + 1
    if stage.data is not None:
        file = TokenFile(stage.data)
        rows = file.batches(SEED, ROWS, length, vocabulary=model.config.vocab_size, split="test")
        return {"data": next(rows)}
    assert texts is not None
    shares = {"tasks": 1.0, "source": 0.0}
    return {
        kind: next(training_batches(SEED, ROWS, length, task_share=share, encoding=texts[1], split="test"))
        for kind, share in shares.items()
    }


@torch.no_grad()
def _losses(model: Zaya, stage: Stage, batch: Batch) -> dict[str, float]:
    """Over all tokens, fully masked, as many rows at once as the stage trains."""
    device = model.model.embed_tokens.weight.device
    tokens = torch.from_numpy(batch.tokens).to(device)
    counts = label_counts(model.config, tokens)
    rng = np.random.default_rng(SEED)
    starts = torch.from_numpy(block_starts(rng, len(tokens), stage.length, stage.max_block)).to(device)
    found = {"next_token": 0.0} if stage.objective == "next_token" else {"next_token": 0.0, "mask": 0.0}
    for part, begins in zip(*(t.split(stage.batch // stage.micro_batches) for t in (tokens, starts)), strict=True):
        if stage.objective == "next_token":
            losses = next_token_loss(model, part, counts=counts)
        else:
            losses = conversion_loss(model, part, begins, alpha=stage.alpha, counts=counts)
        found["next_token"] += float(losses.next_token)
        if losses.mask is not None:
            found["mask"] += float(losses.mask)
    return found


def _decoded(model: Zaya, stage: Stage, texts: Texts | None, kinds: dict[str, Batch]) -> dict[str, float]:
    converted = stage.objective == "conversion"
    decoding = DecodingConfig("two_forward", draft_tokens=_DRAFT_TOKENS) if converted else DecodingConfig()
    problems = []
    if stage.data is None:
        assert texts is not None
        problems = [problem for family in FAMILIES for problem in evaluation_problems(family, 1, SEED)]
        prompts, wanted = [texts[1].prompt(problem) for problem in problems], NEW_TOKENS
    else:
        prompts = [row[:PROMPT_TOKENS].tolist() for row in islice(kinds["data"].tokens, ROWS)]
        wanted = PROMPT_TOKENS
    room = min(wanted, model.config.max_position_embeddings - max(map(len, prompts)))
    if room < 1:
        return {}
    result = generate(model, prompts, decoding, max_new_tokens=room, seed=SEED)
    found: dict[str, float] = {}
    if converted:
        found["acceptance_length"] = sum(map(len, result.tokens)) / sum(result.steps)
    if problems and texts is not None:
        right = [check(p, texts[0].decode(out)) for p, out in zip(problems, result.tokens, strict=True)]
        found["exact_match"] = sum(right) / len(right)
    return found
