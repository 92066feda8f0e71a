"""Multi-step block diffusion: a block of K masks is filled in up to S forwards, the most confident positions first.

A later forward sees what the earlier ones decided. The confidence of a position is the probability, at temperature 1,
of the token drawn for it. Deciding the surest positions first makes the text depend on that order: without a
verification what is sampled follows neither the autoregressive distribution nor any other simple one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.layout import block, causal, draft
from runtime.samplers.acceptance import Draft, Randomness, constant
from runtime.samplers.state import Decode, Step, commit


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
        self.decode = decode
        self.tokens = torch.full((batch, size), decode.mask_token, device=device)
        self.decided = torch.zeros(batch, size, dtype=torch.bool, device=device)
        self.logits: Tensor | None = None  # [B, K, V], of a position from the step that decided it
        self.share = -(-size // decoding.denoising_steps)
        self.threshold = decoding.confidence_threshold
        self.temperatures = (temperature,) * size
        self.randomness = Once(decode.randomness)

    def fillings(self) -> Iterator[int]:
        """Count the forwards that fill the block. The device is asked whether it is full only where that can differ."""
        for done in range(-(-len(self.temperatures) // self.share)):
            if done and self.threshold is not None and bool(self.decided.all()):
                return
            yield done

    def decide(self, logits: Tensor) -> None:
        """Draw a token for every undecided position from logits [B, K, V], and keep the surest ones."""
        drawn = self.decode.draw(logits, self.temperatures, self.randomness).tokens
        confidence = torch.softmax(logits.float(), -1).gather(-1, drawn[..., None]).squeeze(-1)
        now = unmask(confidence, self.decided, self.share, self.threshold)
        self.tokens = torch.where(now, drawn, self.tokens)
        self.logits = logits if self.logits is None else torch.where(now[..., None], logits, self.logits)
        self.decided = self.decided | now

    def draft(self) -> Draft:
        """The full block, as drafts to judge."""
        assert self.logits is not None
        temperatures = constant(self.temperatures, torch.float32, str(self.tokens.device))
        return Draft(self.tokens, self.logits, temperatures)


def unmask(confidence: Tensor, decided: Tensor, share: int, threshold: float | None) -> Tensor:
    """Which undecided positions to decide now, bool [B, K]: the `share` surest, and all that reach the threshold.

    confidence: float [B, K]; decided: bool [B, K]. Of equally sure positions the first ones count.
    """
    order = confidence.masked_fill(decided, -1.0).argsort(dim=-1, descending=True, stable=True)
    now = order.argsort(-1) < share
    if threshold is not None:
        now = now | (confidence >= threshold)
    return now & ~decided


def step(decode: Decode) -> Step:
    """Commit the K tokens of a block, or between 1 and K + 1 where a verification judges them."""
    return _verified(decode) if decode.decoding.verify else _unverified(decode)


def _verified(decode: Decode) -> Step:
    """Every forward starts from the anchor, as in two_forward, of which one denoising step is the draft."""
    decoding, anchors, device = decode.decoding, decode.anchors, str(decode.anchors.device)
    filled = Block(decode, decoding.draft_temperature)
    for _ in filled.fillings():
        tokens = torch.cat([anchors, filled.tokens], dim=1)
        hidden = decode.forward("draft", tokens, draft(decoding.draft_tokens, device))
        filled.decide(decode.project(hidden[:, 1:]))
    drafts = filled.draft()
    tokens = torch.cat([anchors, drafts.tokens], dim=1)
    hidden = decode.forward("verify", tokens, causal(decoding.draft_tokens + 1, device))
    logits = decode.project(hidden)
    return commit(decode, logits, drafts, decode.verify(logits, drafts))


def _unverified(decode: Decode) -> Step:
    """The block before enters the cache in the first forward of this one, so that a block costs S forwards at most."""
    size, device = decode.decoding.draft_tokens, str(decode.anchors.device)
    filled = Block(decode, decode.decoding.temperature)
    for number in filled.fillings():
        if number:
            hidden = decode.forward("draft", filled.tokens, block(size, (0,), device))
        else:
            hidden = _behind_pending(decode)
        filled.decide(decode.project(hidden))
    drafts = filled.draft()
    decode.anchors = drafts.tokens[:, -1:]
    return Step(F.pad(drafts.tokens, (1, 0), value=size), drafts.logits, cached=False)


def _behind_pending(decode: Decode) -> Tensor:
    """Hidden states [B, K, hidden] of a block of masks, from the forward that takes the pending tokens in."""
    size, device, pending = decode.decoding.draft_tokens, decode.anchors.device, decode.pending
    counts = [len(row) for row in pending]
    width, even = max(counts), min(counts) == max(counts)
    masks = [decode.mask_token] * size
    tokens = torch.tensor([[*row, *masks, *[0] * (width - len(row))] for row in pending], device=device)
    layout = block(size, tuple(counts[:1] if even else counts), str(device))
    hidden = decode.forward("draft", tokens, layout, counts=None if even else counts)
    decode.cache.advance(counts)
    slots = torch.tensor(counts, device=device)[:, None] + torch.arange(size, device=device)
    return hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
