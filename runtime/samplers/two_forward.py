"""Draft K tokens in one forward, verify them in a second one; commits the accepted drafts and one token more."""

from __future__ import annotations

import torch

from runtime.layout import causal, draft
from runtime.samplers.state import Decode, Step, commit


def step(decode: Decode) -> Step:
    """Commit between 1 and K + 1 tokens per sequence."""
    decoding, anchors, count = decode.decoding, decode.anchors, decode.decoding.draft_tokens
    device = str(anchors.device)
    masks = torch.full((anchors.shape[0], count), decode.mask_token, device=anchors.device)
    hidden = decode.forward("draft", torch.cat([anchors, masks], dim=1), draft(count, device))
    rows, first = hidden[:, 1:], decoding.draft_temperature
    if decoding.anchor_draft:  # the anchor's own row is the target's distribution of the first draft
        rows, first = torch.cat([hidden[:, :1], hidden[:, 2:]], dim=1), decoding.temperature
    drafts = decode.draw(decode.project(rows), (first, *[decoding.draft_temperature] * (count - 1)))
    hidden = decode.forward("verify", torch.cat([anchors, drafts.tokens], dim=1), causal(count + 1, device))
    logits = decode.project(hidden)
    return commit(decode, logits, drafts, decode.verify(logits, drafts))
