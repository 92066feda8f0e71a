"""Compressed convolutional attention (CCA, arXiv 2510.04476): projections, two short convolutions, attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.config import ModelConfig
from runtime.model.frame import Frame, folds
from runtime.model.layers import Derived, rms_norm


class AttentionWeights(NamedTuple):
    """Weights in the shape the forward uses; derived from the checkpoint's."""

    projection: Tensor  # [query + key + delayed value + current value, hidden]
    projection_bias: Tensor | None
    convolution: Tensor  # [heads, head_dim * taps, head_dim], the two convolutions folded into one
    convolution_bias: Tensor  # [heads, 1, head_dim]
    residual: Tensor  # [heads, heads]: which heads' projections are added to a convolved head
    head_scale: Tensor  # [heads, 1]: 1 for queries, the key temperature for keys
    norm_eps: Tensor  # scalar: only keeps a zero vector from dividing by zero
    before: Tensor | None  # [column]: the column before the first token, when projections have a bias
    output: Tensor  # [hidden, query]
    output_bias: Tensor | None


class CCAProjection(nn.Module):
    """The parameters of the q/k/v path, under their published names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        channels = config.query_size + config.kv_size
        self.q_proj = nn.Linear(hidden, config.query_size, bias=bias)
        self.k_proj = nn.Linear(hidden, config.kv_size, bias=bias)
        self.v_proj_current = nn.Linear(hidden, config.kv_size // 2, bias=bias)
        self.v_proj_delayed = nn.Linear(hidden, config.kv_size // 2, bias=bias)
        heads = config.num_attention_heads + config.num_key_value_heads
        self.conv_qk_depthwise = nn.Conv1d(channels, channels, config.cca_time0, groups=channels)
        self.conv_qk_grouped = nn.Conv1d(channels, channels, config.cca_time1, groups=heads)


class QKNorm(nn.Module):
    """The learned key temperature, one per KV head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.temp = nn.Parameter(torch.zeros(config.num_key_value_heads))


class Attention(Derived):
    """One CCA layer. Slots are [B, S, hidden]; the residual is added by the caller."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.kind = config.layer_types[layer]
        self.qkv_proj = CCAProjection(config)
        self.qk_norm = QKNorm(config)
        self.o_proj = nn.Linear(config.query_size, config.hidden_size, bias=config.attention_bias)

    def derive(self) -> AttentionWeights:
        """One projection, one convolution, and constants."""
        p, config = self.qkv_proj, self.config
        heads = config.num_attention_heads + config.num_key_value_heads
        linears = (p.q_proj, p.k_proj, p.v_proj_delayed, p.v_proj_current)
        depthwise = p.conv_qk_depthwise.weight.float().view(heads, 1, config.head_dim, config.cca_time0)
        grouped = p.conv_qk_grouped.weight.float().view(heads, config.head_dim, config.head_dim, config.cca_time1)
        # A depthwise convolution followed by a grouped one is one grouped convolution of t0 + t1 - 1 taps:
        # out[t] = sum_ij grouped[:, :, j] * depthwise[:, i] * x[t - (t1 - 1 - j) - (t0 - 1 - i)].
        folded = [torch.zeros_like(grouped[..., 0]) for _ in range(config.conv_history + 1)]
        for i in range(config.cca_time0):
            for j in range(config.cca_time1):
                folded[i + j] = folded[i + j] + grouped[..., j] * depthwise[..., i]
        weight = torch.stack(folded, dim=-1).flatten(2).transpose(1, 2)  # [heads, head_dim * taps, head_dim]
        inner = p.conv_qk_depthwise.bias.float().view(heads, 1, config.head_dim)
        bias = p.conv_qk_grouped.bias.float().view(heads, 1, config.head_dim)
        bias = bias + inner @ grouped.sum(-1).transpose(1, 2)
        ones = self.qk_norm.temp.new_ones(config.num_attention_heads)
        dtype = p.q_proj.weight.dtype
        # A query's residual is the mean of itself and its group's key; a key's is the mean of its group's queries'.
        own = torch.eye(config.num_attention_heads, device=bias.device)
        group = torch.eye(config.num_key_value_heads, device=bias.device)
        group = group.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=0)
        queries = torch.cat([own, group], dim=1) / 2
        residual = torch.cat([queries, group.T @ queries / group.sum(0)[:, None]])
        before = None
        if config.attention_bias:  # before the first token the delayed value is the projection of zero
            half = config.kv_size // 2
            before = torch.cat(
                [p.v_proj_delayed.bias.new_zeros(config.query_size + config.kv_size), p.v_proj_delayed.bias]
            )
            assert before.shape[0] == config.query_size + config.kv_size + half
        return AttentionWeights(
            torch.cat([m.weight for m in linears]),
            torch.cat([m.bias for m in linears]) if config.attention_bias else None,
            weight.to(dtype).contiguous(),
            bias.to(dtype),
            residual.to(dtype),
            torch.cat([ones, self.qk_norm.temp])[:, None],
            torch.tensor(1e-14, device=bias.device),
            before,
            self.o_proj.weight,
            self.o_proj.bias,
        )

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        """x: [B, S, hidden] -> [B, S, hidden]. Each step is an operator of its own, so that it can be timed."""
        w = self.weights()
        return self.output(w, self.attention(*self.cca(w, self.qkv(w, x), frame), frame))

    def qkv(self, w: AttentionWeights, x: Tensor) -> Tensor:
        """x [B, S, hidden] -> queries, keys, delayed and current values, before the convolutions, [B, S, columns]."""
        return F.linear(x, w.projection, w.projection_bias)

    def cca(self, w: AttentionWeights, projected: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
        """What is projected -> queries [B, S, heads, D], and all keys and values [B, KV heads, T, D], new ones kept."""
        config = self.config
        batch, slots, _ = projected.shape
        qk_size, heads = config.query_size + config.kv_size, config.num_attention_heads + config.num_key_value_heads
        columns = projected[..., : qk_size + config.kv_size // 2]
        taps, delayed = self._continue(columns, w.before, frame)
        frame.keep(self.layer, columns)

        rows = batch * slots
        taps = taps.reshape(rows, heads, -1).transpose(0, 1)
        convolved = torch.baddbmm(w.convolution_bias, taps, w.convolution).transpose(0, 1)
        residual = torch.matmul(w.residual, columns[..., :qk_size].reshape(rows, heads, config.head_dim))
        # RMS over head_dim is the L2 norm over sqrt(head_dim): normalises to length sqrt(head_dim).
        qk = rms_norm(convolved + residual, w.norm_eps) * w.head_scale
        qk = qk.view(batch, slots, heads, config.head_dim)
        cos, sin, swap = frame.rotary[self.kind]
        qk = torch.addcmul(qk * cos, qk.index_select(-1, swap), sin)
        query, key = qk[:, :, : config.num_attention_heads], qk[:, :, config.num_attention_heads :]
        value = torch.cat([projected[..., qk_size + config.kv_size // 2 :], delayed], dim=-1)
        value = value.view(batch, slots, config.num_key_value_heads, config.head_dim)
        return query, *frame.store(self.layer, key, value)

    def attention(self, query: Tensor, keys: Tensor, values: Tensor, frame: Frame) -> Tensor:
        """`attend` under this layer's mask: [B, S, heads * D]."""
        return attend(query, keys, values, frame.masks[self.kind])

    def output(self, w: AttentionWeights, attended: Tensor) -> Tensor:
        """[B, S, heads * D] -> [B, S, hidden]."""
        return F.linear(attended, w.output, w.output_bias)

    def _continue(self, columns: Tensor, before: Tensor | None, frame: Frame) -> tuple[Tensor, Tensor]:
        """Convolution inputs [B, S, query + key, taps] and the previous token's delayed value [B, S, kv / 2]."""
        batch, slots, width = columns.shape
        history, qk_size = self.config.conv_history, self.config.query_size + self.config.kv_size
        past = columns.new_zeros(batch, history, width) if frame.cache is None else frame.past(self.layer)
        if before is not None:
            empty = [frame.cache is None or n == 0 for n in (frame.cache.lengths if frame.cache else [0] * batch)]
            past = torch.where(torch.tensor(empty, device=past.device)[:, None, None], before, past)
        extended = torch.cat([past, columns], dim=1)
        if frame.taps is None:
            taps = extended[..., :qk_size].unfold(1, history + 1, 1)
            return taps, extended[:, history - 1 : history - 1 + slots, qk_size:]
        # Row gathers on a flat view: their backward is an index_add, which is far faster than an accumulating put.
        length = slots + history
        flat = extended.reshape(batch * length, width)
        index = frame.taps + torch.arange(batch, device=columns.device)[:, None, None] * length
        gathered = flat[:, :qk_size].index_select(0, index.flatten()).view(batch, slots, history + 1, qk_size)
        delayed = flat[:, qk_size:].index_select(0, index[..., -2].flatten()).view(batch, slots, -1)
        return gathered.transpose(2, 3), delayed


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention over grouped heads.

    query [B, S, heads, D]; keys, values [B, KV heads, T, D]; mask from `attention_mask`, or None -> [B, S, heads * D].
    """
    batch, slots, heads, width = query.shape
    groups = keys.shape[1]
    repeat = heads // groups
    if folds(slots):
        rows = query.view(batch, slots, groups, repeat, width).permute(0, 2, 3, 1, 4)
        rows = rows.reshape(batch, groups, repeat * slots, width)
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
        out = out.view(batch, groups, repeat, slots, width).permute(0, 3, 1, 2, 4)
    else:
        out = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=repeat > 1)
        out = out.transpose(1, 2)
    return out.reshape(batch, slots, heads * width)
