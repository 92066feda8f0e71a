"""How the slots of one forward lie: positions, who sees whom, and which token each convolution starts from.

Prefill, decode, draft, verify and the conversion's training sequences differ in nothing else: one forward serves all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """S slots that follow the cached tokens of every sequence.

    offsets: int64 [S] or [B,S], a slot's position minus the cached length.
    visible: bool [S,S] or [B,S,S], slot s sees slot t; None means causal. Cached tokens are seen by every slot.
    previous: int64 [S] or [B,S], the slot whose state the convolution and the delayed value of s continue; -1 is
        the last cached token. None means the slot before (slot 0 continues the cache).
    committed: leading slots that form a causal chain and whose state the cache keeps.
    contiguous: whether offsets are 0, 1, 2 ..., so that views serve where indices otherwise would.
    """

    offsets: Tensor
    visible: Tensor | None
    previous: Tensor | None
    committed: int
    contiguous: bool = False

    @property
    def slots(self) -> int:
        """Slots per sequence."""
        return int(self.offsets.shape[-1])


@lru_cache(maxsize=256)
def causal(slots: int, device: str = "cpu") -> Layout:
    """A run of true tokens: prefill, one decoding step, or the verify forward [anchor, K drafts]."""
    return Layout(torch.arange(slots, device=device), None, None, slots, contiguous=True)


@lru_cache(maxsize=256)
def draft(draft_tokens: int, device: str = "cpu") -> Layout:
    """[anchor, K masks]: the anchor is causal; the masks see the prefix, the anchor and each other. Nothing is kept."""
    slots = draft_tokens + 1
    visible = torch.ones(slots, slots, dtype=torch.bool, device=device)
    visible[0, 1:] = False
    return Layout(torch.arange(slots, device=device), visible, None, 0, contiguous=True)


@lru_cache(maxsize=64)
def block(masks: int, pending: tuple[int, ...], device: str = "cpu") -> Layout:
    """[pending tokens, K masks] of plain block diffusion: the pending tokens are causal and kept, the masks see them,
    the prefix and each other. pending: how many of them each sequence has, or one number for all.

    Where they differ, the longest row gives the number of slots, and nobody sees the padding behind a shorter one.
    """
    tokens, slot = torch.tensor(pending, device=device)[:, None], torch.arange(max(pending) + masks, device=device)
    inside = (slot >= tokens) & (slot < tokens + masks)  # [rows, S]
    visible = (slot[:, None] >= slot) | (inside[:, :, None] & inside[:, None])
    return Layout(slot, visible, None, max(pending), contiguous=True)


@lru_cache(maxsize=256)
def single_forward(draft_tokens: int, levels: tuple[int, ...], device: str = "cpu") -> Layout:
    """[anchor, K drafts], causal and kept, then for every level j a block of K + 1 masks that drafts ahead.

    The block of level j is laid as if j drafts had been accepted and the anchor stood at their last: its positions
    follow, it sees the prefix, the verified slots 0 .. j and itself in both directions, and its convolutions start
    from slot j.
    """
    width = draft_tokens + 1
    slot = torch.arange(width * (1 + len(levels)), device=device)
    group, inside = slot // width, slot % width
    level = torch.tensor((-1, *levels), device=device)[group]  # -1: the verified slots
    masked = group > 0
    own = (group[:, None] == group) & (masked[:, None] | (slot[:, None] >= slot))
    visible = own | (slot <= level[:, None])
    previous = torch.where(masked & (inside == 0), level, slot - 1)
    return Layout(level + 1 + inside, visible, previous, width)


def predecessors(previous: Tensor, history: int) -> Tensor:
    """Indices [..., S, history + 1] of each slot's convolution inputs, oldest first, the slot itself last.

    They index the sequence [history cached columns, S slots]. previous: int64 [..., S], -1 for the last cached token.
    """
    slots = torch.arange(previous.shape[-1], device=previous.device).expand_as(previous)
    chain = torch.cat(  # the predecessor of every entry of [cached columns, slots]; the oldest cached one is its own
        [
            torch.arange(-1, history - 1, device=previous.device).clamp_min(0).expand(*previous.shape[:-1], history),
            previous + history,
        ],
        dim=-1,
    )
    taps = [slots + history]
    for _ in range(history):
        taps.append(torch.gather(chain, -1, taps[-1]))
    return torch.stack(taps[::-1], dim=-1)
