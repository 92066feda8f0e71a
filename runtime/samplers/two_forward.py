"""Draft K tokens in one forward, verify them in a second one; commits the accepted drafts and one token more."""

from __future__ import annotations

import torch

from runtime.layout import causal, draft
from runtime.samplers.acceptance import draw_drafts, verify
from runtime.samplers.state import Decode, commit


def step(decode: Decode) -> list[list[int]]:
    """Commit between 1 and K + 1 tokens per sequence."""
    decoding, anchors, count = decode.decoding, decode.anchors, decode.decoding.draft_tokens
    device = str(anchors.device)
    masks = torch.full((anchors.shape[0], count), decode.mask_token, device=anchors.device)
    hidden = decode.forward("draft", torch.cat([anchors, masks], dim=1), draft(count, device))
    temperatures = torch.full((count,), decoding.draft_temperature, device=anchors.device)
    rows = hidden[:, 1:]
    if decoding.anchor_draft:  # the anchor's own row is the target's distribution of the first draft
        rows = torch.cat([hidden[:, :1], hidden[:, 2:]], dim=1)
        temperatures[0] = decoding.temperature
    drafts = draw_drafts(decode.model.project(rows), temperatures, decode.randomness)
    hidden = decode.forward("verify", torch.cat([anchors, drafts.tokens], dim=1), causal(count + 1, device))
    logits = decode.model.project(hidden)
    accepted = verify(logits, drafts, decoding.temperature, decoding.mixing_weight, decode.randomness)
    return commit(decode, drafts, accepted)
