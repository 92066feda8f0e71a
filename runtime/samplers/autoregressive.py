"""One token per forward: the baseline, and the oracle that every lossless sampler must equal."""

from __future__ import annotations

import torch.nn.functional as F

from runtime.layout import causal
from runtime.samplers.state import Decode, Step


def step(decode: Decode) -> Step:
    """Commit one token per sequence."""
    hidden = decode.forward("decode", decode.anchors, causal(1, str(decode.anchors.device)))
    logits = decode.project(hidden)
    decode.anchors = decode.draw(logits, (decode.decoding.temperature,)).tokens
    return Step(F.pad(decode.anchors, (1, 0), value=1), logits)
