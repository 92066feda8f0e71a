"""CCA between the projections and attention, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.config import ModelConfig, require
from runtime.model.attention import AttentionWeights

EPS = 1e-14  # only keeps a zero vector from dividing by zero


class CCAWeights(NamedTuple):
    """The two convolutions folded into one, with the output channels of a head side by side."""

    convolution: Tensor  # [query + KV heads, taps, head_dim in, head_dim out]
    convolution_bias: Tensor  # [query + KV heads, head_dim]
    temperature: Tensor  # fp32 [KV heads]


def cca_weights(weights: AttentionWeights, config: ModelConfig) -> CCAWeights:
    """From what eager attention derives. UserError for an attention bias, which only eager serves."""
    require(not config.attention_bias, "attention_bias must be false for the fused forward, but is true")
    heads, width = config.num_attention_heads + config.num_key_value_heads, config.head_dim
    convolution = weights.convolution.view(heads, width, config.conv_history + 1, width).transpose(1, 2).contiguous()
    temperature = weights.head_scale[config.num_attention_heads :, 0].float().contiguous()
    return CCAWeights(convolution, weights.convolution_bias.view(heads, width).contiguous(), temperature)


def cca(
    projected: Tensor,
    weights: CCAWeights,
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    taps: Tensor,
    committed: int,
    cos: Tensor,
    sin: Tensor,
    swap: Tensor,
) -> Tensor:
    """Queries [B * S, Hq, D]; keys, values and committed columns of the slots are written into the cache.

    projected [B * S, query | key | delayed value | current value]; keys, values [rows, capacity, Hk, D]; columns
    [rows, ring + 1, query | key | delayed value], all for B <= rows. lengths int32 [B]; offsets int32 [S], a slot's
    position minus the length; taps int32 [S, history + 1], what a slot's convolution reads of [history cached columns,
    S slots], itself last; committed: leading slots whose columns the ring keeps, the last `ring` of them at most.
    cos, sin [P, D] and swap int64 [D] as in `Rotary`.
    """
    batch, slots, history = lengths.shape[0], taps.shape[0], taps.shape[1] - 1
    heads, _, width, _ = weights.convolution.shape
    kv_heads, ring = keys.shape[2], columns.shape[1] - 1
    query_heads, channels, tokens = heads - kv_heads, heads * width, batch * slots
    rows, length = torch.arange(batch, device=lengths.device)[:, None], lengths.long()[:, None]
    slot = torch.arange(slots, device=lengths.device)

    column, current = projected.view(batch, slots, -1).split([columns.shape[2], kv_heads * width // 2], dim=-1)
    past = columns[rows, (length + torch.arange(-history, 0, device=lengths.device)) % ring]
    extended = torch.cat([past, column], dim=1)
    if committed:
        last = slot[max(0, committed - ring) : committed]
        columns[rows, (length + last) % ring] = column[:, max(0, committed - ring) : committed]
    gathered = extended[:, taps.long()]  # [B, S, history + 1, column]

    inputs = gathered[..., :channels].reshape(tokens, history + 1, heads, width).permute(2, 0, 1, 3)
    convolved = torch.baddbmm(
        weights.convolution_bias[:, None], inputs.reshape(heads, tokens, -1), weights.convolution.flatten(1, 2)
    ).transpose(0, 1)
    own = column[..., :channels].reshape(tokens, heads, width)
    group = own[:, :query_heads].view(tokens, kv_heads, -1, width)  # the query heads of each KV head
    means = torch.cat(  # of a query and its key; of a key and the mean of its queries
        [
            (group + own[:, query_heads:, None]).mul(0.5).flatten(1, 2),
            (group.mean(2) + own[:, query_heads:]).mul(0.5),
        ],
        dim=1,
    )
    qk = (convolved + means).float()
    norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True)
    qk = (qk * (norm * norm / width + EPS).rsqrt()).to(projected.dtype)
    query, key = qk.split([query_heads, kv_heads], dim=1)
    qk = torch.cat([query, key * weights.temperature.to(key.dtype)[:, None]], dim=1)
    position = (length + offsets).flatten()
    qk = qk * cos[position][:, None] + qk[..., swap] * sin[position][:, None]

    where = length + slot  # a slot's cache row, whatever its position
    keys[rows, where] = qk[:, query_heads:].reshape(batch, slots, kv_heads, width)
    delayed = gathered[:, :, -2, channels:]
    values[rows, where] = torch.cat([current, delayed], dim=-1).view(batch, slots, kv_heads, width)
    return qk[:, :query_heads].contiguous()
