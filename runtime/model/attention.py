"""Compressed convolutional attention (CCA, arXiv 2510.04476): projections, two short convolutions, attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.cache import Cache
from runtime.config import ModelConfig

_FOLD_SLOTS = 64  # up to here the query heads of one KV head are folded into rows, so that K and V are read once


@dataclass
class Frame:
    """What all layers of one forward share. B sequences, S slots, T keys (cached tokens, then the slots)."""

    rotary: dict[str, tuple[Tensor, Tensor, Tensor]]  # by layer type: cos, sin, swap index
    masks: dict[str, Tensor | None]  # by layer type, as `attend` wants them; None: every slot sees every key
    taps: Tensor | None  # int64 [S, history + 1] or [B, S, history + 1] into [cached columns, slots]; None: a chain
    committed: int  # leading slots whose columns are kept
    cache: Cache | None
    total: int  # T
    start: int | None  # the cached length when all sequences share it, else None
    batch: Tensor  # int64 [B, 1] counting the sequences
    rows: Tensor | None  # int64 [B, S] cache rows of the slots, when lengths differ
    history_rows: Tensor | None  # int64 [history] or [B, history]: ring entries of the last cached columns
    ring_rows: Tensor | None  # int64 [W] or [B, W]: ring entries that the kept columns go to
    ring_slots: Tensor | None  # int64 [B, W]: which slots those are, in a ragged prefill; None: the first W


class Fused(NamedTuple):
    """Weights in the shape the forward uses; derived from the checkpoint's."""

    projection: Tensor  # [query + key + delayed value + current value, hidden]
    projection_bias: Tensor | None
    convolution: Tensor  # [heads, head_dim * taps, head_dim], the two convolutions folded into one
    convolution_bias: Tensor  # [heads, 1, head_dim]
    residual: Tensor  # [heads, heads]: which heads' projections are added to a convolved head
    head_scale: Tensor  # [heads, 1]: 1 for queries, the key temperature for keys


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


class Attention(nn.Module):
    """One CCA layer. Slots are [B, S, hidden]; the residual is added by the caller."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.kind = config.layer_types[layer]
        self.qkv_proj = CCAProjection(config)
        self.qk_norm = QKNorm(config)
        self.o_proj = nn.Linear(config.query_size, config.hidden_size, bias=config.attention_bias)
        self._fused: Fused | None = None

    def freeze(self) -> None:
        """Derive the fused weights once, for inference."""
        self._fused = self._fuse()

    def thaw(self) -> None:
        """Forget the fused weights: parameters may change again."""
        self._fused = None

    def _fuse(self) -> Fused:
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
        return Fused(
            torch.cat([m.weight for m in linears]),
            torch.cat([m.bias for m in linears]) if config.attention_bias else None,
            weight.to(dtype).contiguous(),
            bias.to(dtype),
            residual.to(dtype),
            torch.cat([ones, self.qk_norm.temp])[:, None],
        )

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        """x: [B, S, hidden] -> [B, S, hidden]."""
        config, fused = self.config, self._fused or self._fuse()
        batch, slots, _ = x.shape
        qk_size, half = config.query_size + config.kv_size, config.kv_size // 2
        projected = F.linear(x, fused.projection, fused.projection_bias)
        columns = projected[..., : qk_size + half]
        taps, delayed = self._continue(columns, frame)
        self._keep(columns, frame)

        heads = config.num_attention_heads + config.num_key_value_heads
        rows = batch * slots
        convolved = torch.baddbmm(
            fused.convolution_bias, taps.reshape(rows, heads, -1).transpose(0, 1), fused.convolution
        ).transpose(0, 1)
        residual = torch.matmul(fused.residual, columns[..., :qk_size].reshape(rows, heads, config.head_dim))
        # RMS over head_dim is the L2 norm over sqrt(head_dim): one op for normalising to length sqrt(head_dim).
        qk = F.rms_norm(convolved + residual, (config.head_dim,), eps=1e-14)
        qk = (qk * fused.head_scale).view(batch, slots, heads, config.head_dim)
        cos, sin, swap = frame.rotary[self.kind]
        qk = torch.addcmul(qk * cos, qk.index_select(-1, swap), sin)
        query, key = qk[:, :, : config.num_attention_heads], qk[:, :, config.num_attention_heads :]
        value = torch.cat([projected[..., qk_size + half :], delayed], dim=-1)
        value = value.view(batch, slots, config.num_key_value_heads, config.head_dim)
        keys, values = self._store(key, value, frame)
        return self.o_proj(attend(query, keys, values, frame.masks[self.kind]))

    def _continue(self, columns: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """Convolution inputs [B, S, query + key, taps] and the previous token's delayed value [B, S, kv / 2]."""
        batch, slots, width = columns.shape
        history, qk_size = self.config.conv_history, self.config.query_size + self.config.kv_size
        if frame.cache is None:
            past = columns.new_zeros(batch, history, width)
            bias = self.qkv_proj.v_proj_delayed.bias
            if bias is not None:  # before the first token the delayed value is the projection of zero
                past = torch.cat([past[..., :qk_size], bias.expand(batch, history, -1).to(past.dtype)], dim=-1)
        else:
            past = self._history(frame)
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

    def _history(self, frame: Frame) -> Tensor:
        """The cached columns before the first slot, oldest first: [B, history, column]. Writes the new ones later."""
        assert frame.cache is not None and frame.history_rows is not None
        ring = frame.cache.columns[self.layer]
        if frame.history_rows.dim() == 1:
            past = ring.index_select(1, frame.history_rows)
        else:
            past = ring[frame.batch, frame.history_rows]
        bias = self.qkv_proj.v_proj_delayed.bias
        if bias is not None and min(frame.cache.lengths) == 0:
            qk_size = self.config.query_size + self.config.kv_size
            empty = torch.tensor([n == 0 for n in frame.cache.lengths], device=past.device)[:, None, None]
            past = torch.cat([past[..., :qk_size], torch.where(empty, bias, past[..., qk_size:])], dim=-1)
        return past

    def _store(self, key: Tensor, value: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """Write keys and values behind the cached ones; return all of them as [B, KV heads, T, head_dim]."""
        cache = frame.cache
        if cache is None:
            return key.transpose(1, 2), value.transpose(1, 2)
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        if frame.start is not None:
            keys[:, frame.start : frame.total] = key
            values[:, frame.start : frame.total] = value
        else:
            keys[frame.batch, frame.rows] = key
            values[frame.batch, frame.rows] = value
        return keys[:, : frame.total].transpose(1, 2), values[:, : frame.total].transpose(1, 2)

    def _keep(self, columns: Tensor, frame: Frame) -> None:
        """Write the committed slots' columns into the ring, at their positions."""
        if frame.cache is None or frame.ring_rows is None:
            return
        ring = frame.cache.columns[self.layer]
        if frame.ring_slots is not None:
            ring[frame.batch, frame.ring_rows] = columns[frame.batch, frame.ring_slots]
        elif frame.ring_rows.dim() == 1:
            ring.index_copy_(1, frame.ring_rows, columns[:, : frame.committed])
        else:
            ring[frame.batch, frame.ring_rows] = columns[:, : frame.committed]


def folds(slots: int) -> bool:
    """Whether `attend` folds the query heads of a KV head into rows: K and V are then read once for all of them."""
    return slots <= _FOLD_SLOTS


def attention_mask(visible: Tensor, repeat: int, dtype: torch.dtype) -> Tensor:
    """The additive mask that `attend` takes, from bool [1 or B, S, T] and the query heads per KV head."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    mask = mask.unsqueeze(1)
    return mask.repeat(1, 1, repeat, 1) if folds(visible.shape[1]) else mask


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
