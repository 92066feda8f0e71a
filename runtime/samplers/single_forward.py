"""Verify K drafts and draft ahead for several acceptance counts, in one forward (TiDAR, arXiv 2511.08923)."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.layout import single_forward
from runtime.samplers.acceptance import Draft, constant
from runtime.samplers.state import Decode, Step, commit


def step(decode: Decode) -> Step:
    """Commit between 1 and K + 1 tokens per sequence, and leave drafts for the next step in `decode.drafted`.

    A sequence without drafts (its first step) commits one token.
    """
    decoding, anchors, count = decode.decoding, decode.anchors, decode.decoding.draft_tokens
    drafts = decode.drafted if decode.drafted is not None else undrafted(decode)
    slots = len(decoding.levels) * (count + 1)
    masks = torch.full((anchors.shape[0], slots), decode.mask_token, device=anchors.device)
    layout = single_forward(count, decoding.levels, str(anchors.device))
    hidden = decode.forward("single", torch.cat([anchors, drafts.tokens, masks], dim=1), layout)
    logits = decode.project(hidden[:, : count + 1])
    accepted = decode.verify(logits, drafts)
    decode.drafted = _draft_ahead(decode, hidden, accepted.count)
    return commit(decode, logits, drafts, accepted)


def _draft_ahead(decode: Decode, hidden: Tensor, accepted: Tensor) -> Draft:
    """Drafts behind the token that follows `accepted` [B] drafts, from the block of the closest level.

    The first mask of a block stands for that token. A block that is d tokens stale has d more masks for tokens known
    by now; what is left are K - d drafts, and padding that no verification judges.
    """
    decoding, device = decode.decoding, hidden.device
    count, temperatures = decoding.draft_tokens, (decoding.draft_temperature,) * decoding.draft_tokens
    levels = constant(decoding.levels, torch.int64, str(device))
    chosen = torch.bucketize(accepted, levels, right=True) - 1
    stale = accepted - levels[chosen]
    mask = (stale[:, None] + 1 + torch.arange(count, device=device)).clamp_max(count)
    rows = (1 + chosen[:, None]) * (count + 1) + mask
    logits = decode.project(hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[-1])))
    return decode.draw(logits, temperatures)._replace(lengths=count - stale)


def undrafted(decode: Decode) -> Draft:
    """K drafts per sequence of which none counts."""
    decoding, device = decode.decoding, decode.anchors.device
    batch, count = decode.anchors.shape[0], decoding.draft_tokens
    return Draft(
        torch.zeros(batch, count, dtype=torch.int64, device=device),
        torch.zeros(1, device=device).expand(batch, count, decode.model.config.vocab_size),
        constant((decoding.draft_temperature,) * count, torch.float32, str(device)),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )
