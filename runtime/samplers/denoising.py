"""Multi-step block diffusion: a block of K masks is filled in up to S forwards, the most confident positions first.

A later forward sees what the earlier ones decided. The confidence of a position is the probability, at temperature 1,
of the token drawn for it. Deciding the surest positions first makes the text depend on that order: without a
verification what is sampled follows neither the autoregressive distribution nor any other simple one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.layout import block, causal, draft
from runtime.samplers.acceptance import Draft, Randomness, draw_drafts, verify
from runtime.samplers.state import Decode, commit


class Once(Randomness):
    """The same draws at every step of a block, so that the steps which neighbours need change nobody's stream."""

    def __init__(self, source: Randomness) -> None:
        self.source = source
        self.drawn: Tensor | None = None

    def uniform(self, count: int, device: torch.device) -> Tensor:
        """float64 [B, count] in [0, 1), from the source the first time."""
        if self.drawn is None:
            self.drawn = self.source.uniform(count, device)
        return self.drawn


class Block:
    """K positions per sequence, being decided. `tokens` int64 [B, K] holds the mask token where none is decided yet."""

    def __init__(self, decode: Decode, temperature: float) -> None:
        decoding, device = decode.decoding, decode.anchors.device
        batch, size = decode.anchors.shape[0], decoding.draft_tokens
        self.tokens = torch.full((batch, size), decode.mask_token, device=device)
        self.decided = torch.zeros(batch, size, dtype=torch.bool, device=device)
        self.logits: Tensor | None = None  # float32 [B, K, V], of a position from the step that decided it
        self.share = -(-size // decoding.denoising_steps)
        self.threshold = decoding.confidence_threshold
        self.temperatures = torch.full((size,), temperature, device=device)
        self.randomness = Once(decode.randomness)

    @property
    def full(self) -> bool:
        """Whether every position of every sequence is decided."""
        return bool(self.decided.all())

    def decide(self, logits: Tensor) -> None:
        """Draw a token for every undecided position from float32 logits [B, K, V], and keep the surest ones."""
        drawn = draw_drafts(logits, self.temperatures, self.randomness).tokens
        confidence = torch.softmax(logits, -1).gather(-1, drawn[..., None]).squeeze(-1)
        now = unmask(confidence, self.decided, self.share, self.threshold)
        self.tokens = torch.where(now, drawn, self.tokens)
        self.logits = logits if self.logits is None else torch.where(now[..., None], logits, self.logits)
        self.decided = self.decided | now

    def draft(self) -> Draft:
        """The full block, as drafts to judge."""
        assert self.logits is not None
        return Draft(self.tokens, self.logits, self.temperatures)


def unmask(confidence: Tensor, decided: Tensor, share: int, threshold: float | None) -> Tensor:
    """Which undecided positions to decide now, bool [B, K]: the `share` surest, and all that reach the threshold.

    confidence: float [B, K]; decided: bool [B, K]. Of equally sure positions the first ones count.
    """
    order = confidence.masked_fill(decided, -1.0).argsort(dim=-1, descending=True, stable=True)
    now = order.argsort(-1) < share
    if threshold is not None:
        now = now | (confidence >= threshold)
    return now & ~decided


def step(decode: Decode) -> list[list[int]]:
    """Commit the K tokens of a block, or between 1 and K + 1 where a verification judges them."""
    return _verified(decode) if decode.decoding.verify else _unverified(decode)


def _verified(decode: Decode) -> list[list[int]]:
    """Every forward starts from the anchor, as in two_forward, of which one denoising step is the draft."""
    decoding, anchors, device = decode.decoding, decode.anchors, str(decode.anchors.device)
    filled = Block(decode, decoding.draft_temperature)
    while not filled.full:
        tokens = torch.cat([anchors, filled.tokens], dim=1)
        hidden = decode.forward("draft", tokens, draft(decoding.draft_tokens, device))
        filled.decide(decode.model.project(hidden[:, 1:]))
    drafts = filled.draft()
    tokens = torch.cat([anchors, drafts.tokens], dim=1)
    hidden = decode.forward("verify", tokens, causal(decoding.draft_tokens + 1, device))
    logits = decode.model.project(hidden)
    accepted = verify(logits, drafts, decoding.temperature, decoding.mixing_weight, decode.randomness)
    return commit(decode, drafts, accepted)


def _unverified(decode: Decode) -> list[list[int]]:
    """The block before enters the cache in the first forward of this one, so that a block costs S forwards at most."""
    size, device = decode.decoding.draft_tokens, decode.anchors.device
    filled = Block(decode, decode.decoding.temperature)
    pending = decode.pending
    counts = [len(row) for row in pending]
    width, even = max(counts), min(counts) == max(counts)
    masks = [decode.mask_token] * size
    tokens = torch.tensor([[*row, *masks, *[0] * (width - len(row))] for row in pending], device=device)
    layout = block(size, tuple(counts[:1] if even else counts), str(device))
    hidden = decode.forward("draft", tokens, layout, counts=None if even else counts)
    decode.cache.advance(counts)
    slots = torch.tensor(counts, device=device)[:, None] + torch.arange(size, device=device)
    hidden = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
    filled.decide(decode.model.project(hidden))
    while not filled.full:
        hidden = decode.forward("draft", filled.tokens, block(size, (0,), str(device)))
        filled.decide(decode.model.project(hidden))
    drafts = filled.draft()
    decode.note(drafts.logits, [size] * len(counts))
    committed = drafts.tokens.tolist()
    decode.anchors, decode.behind = drafts.tokens[:, -1:], [row[:-1] for row in committed]
    return committed
