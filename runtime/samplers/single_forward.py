"""Verify K drafts and draft ahead for several acceptance counts, in one forward (TiDAR, arXiv 2511.08923)."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.layout import single_forward
from runtime.samplers.acceptance import Draft, draw_drafts, verify
from runtime.samplers.state import Decode, commit


def step(decode: Decode) -> list[list[int]]:
    """Commit between 1 and K + 1 tokens per sequence, and leave drafts for the next step in `decode.drafted`.

    A sequence without drafts (its first step) commits one token.
    """
    decoding, anchors, count = decode.decoding, decode.anchors, decode.decoding.draft_tokens
    drafts = decode.drafted if decode.drafted is not None else _none(decode)
    slots = len(decoding.levels) * (count + 1)
    masks = torch.full((anchors.shape[0], slots), decode.mask_token, device=anchors.device)
    layout = single_forward(count, decoding.levels, str(anchors.device))
    hidden = decode.forward("single", torch.cat([anchors, drafts.tokens, masks], dim=1), layout)
    logits = decode.model.project(hidden[:, : count + 1])
    accepted = verify(logits, drafts, decoding.temperature, decoding.mixing_weight, decode.randomness)
    decode.drafted = _draft_ahead(decode, hidden, accepted.count)
    return commit(decode, drafts, accepted)


def _draft_ahead(decode: Decode, hidden: Tensor, accepted: Tensor) -> Draft:
    """Drafts behind the token that follows `accepted` [B] drafts, from the block of the closest level.

    The first mask of a block stands for that token. A block that is d tokens stale has d more masks for tokens known
    by now; what is left are K - d drafts, and padding that no verification judges.
    """
    count, device = decode.decoding.draft_tokens, hidden.device
    levels = torch.tensor(decode.decoding.levels, device=device)
    chosen = torch.bucketize(accepted, levels, right=True) - 1
    stale = accepted - levels[chosen]
    mask = (stale[:, None] + 1 + torch.arange(count, device=device)).clamp_max(count)
    rows = (1 + chosen[:, None]) * (count + 1) + mask
    logits = decode.model.project(hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[-1])))
    return draw_drafts(logits, _temperatures(decode), decode.randomness)._replace(lengths=count - stale)


def _none(decode: Decode) -> Draft:
    """K drafts per sequence of which none counts."""
    shape, device = (decode.anchors.shape[0], decode.decoding.draft_tokens), decode.anchors.device
    return Draft(
        torch.zeros(shape, dtype=torch.int64, device=device),
        torch.zeros(*shape, decode.model.config.vocab_size, device=device),
        _temperatures(decode),
        torch.zeros(shape[0], dtype=torch.int64, device=device),
    )


def _temperatures(decode: Decode) -> Tensor:
    decoding = decode.decoding
    return torch.full((decoding.draft_tokens,), decoding.draft_temperature, device=decode.anchors.device)
