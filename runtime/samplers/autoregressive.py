"""One token per forward: the baseline, and the oracle that every lossless sampler must equal."""

from __future__ import annotations

from runtime.layout import causal
from runtime.samplers.acceptance import sample
from runtime.samplers.state import Decode


def step(decode: Decode) -> list[list[int]]:
    """Commit one token per sequence."""
    hidden = decode.forward("decode", decode.anchors, causal(1, str(decode.anchors.device)))
    logits = decode.model.project(hidden)
    token = sample(logits[:, -1], decode.decoding.temperature, decode.randomness)
    decode.note(logits, [1] * decode.cache.batch)
    decode.cache.advance([1] * decode.cache.batch)
    decode.anchors = token[:, None]
    return [[t] for t in token.tolist()]
