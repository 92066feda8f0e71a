"""The ZAYA decoder in plain torch: module and parameter names are those of the published checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.cache import Cache
from runtime.config import KernelConfig, ModelConfig, require
from runtime.layout import Layout, causal, predecessors
from runtime.model.attention import Attention, Frame, attention_mask
from runtime.model.moe import MoE, RMSNorm
from runtime.model.rotary import Rotary


class ResidualScaling(nn.Module):
    """A learned scale and bias per channel on the branch and on the residual, which stays in fp32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.hidden_states_scale = nn.Parameter(torch.ones(size))
        self.hidden_states_bias = nn.Parameter(torch.zeros(size))
        self.residual_scale = nn.Parameter(torch.ones(size))
        self.residual_bias = nn.Parameter(torch.zeros(size))
        self._constant: Tensor | None = None

    def freeze(self) -> None:
        """Sum the two constant terms once, for inference."""
        self._constant = self._sum()

    def thaw(self) -> None:
        """Forget the derived constant: parameters may change again."""
        self._constant = None

    def _sum(self) -> Tensor:
        branch = self.hidden_states_bias.float() * self.hidden_states_scale.float()
        return branch + self.residual_bias.float() * self.residual_scale.float()

    def forward(self, branch: Tensor, residual: Tensor) -> Tensor:
        """(branch + bias) * scale + (residual + bias) * scale, [..., size] in fp32."""
        constant = self._sum() if self._constant is None else self._constant
        out = torch.addcmul(constant, branch.float(), self.hidden_states_scale.float())
        return torch.addcmul(out, residual, self.residual_scale.float())


class Layer(nn.Module):
    """Attention, then experts, each behind a norm and added by residual scaling."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MoE(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_residual_scale = ResidualScaling(config.hidden_size)
        self.post_mlp_residual_scale = ResidualScaling(config.hidden_size)


class Decoder(nn.Module):
    """Everything before the LM head, under the published prefix `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_hidden_states_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.input_hidden_states_bias = nn.Parameter(torch.zeros(config.hidden_size))


class Zaya(nn.Module):
    """ZAYA for causal and block-diffusion decoding.

    `forward` runs any `Layout` of slots; `logits` is the plain causal model. `kernels` says how the experts run.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.kernels = KernelConfig()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary = Rotary(config)
        self._kinds: list[str] = sorted(set(config.layer_types))

    def freeze(self) -> Zaya:
        """Derive the inference weights and stop gradients. Returns self."""
        self.requires_grad_(False).train(False)
        for module in self.modules():
            if isinstance(module, (Attention, ResidualScaling)):
                module.freeze()
        return self

    def train(self, mode: bool = True) -> Zaya:
        """Parameters may change from here on, so derived weights are dropped."""
        for module in self.modules():
            if hasattr(module, "thaw"):
                module.thaw()
        return super().train(mode)

    def new_cache(self, batch: int, capacity: int, max_slots: int) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` positions, scratch slots included."""
        weight = self.model.embed_tokens.weight
        return Cache(self.config, batch, capacity, max_slots, dtype=weight.dtype, device=str(weight.device))

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Causal logits. input_ids int64 [B, T], attention_mask 1 for real tokens [B, T] (left or right padded).

        Returns float32 [B, T, V]; rows of padding are undefined. Raises UserError beyond max_position_embeddings.
        """
        slots, context = input_ids.shape[1], self.config.max_position_embeddings
        require(slots <= context, f"tokens must fit the context of {context}, but got {slots}")
        shift = None
        if attention_mask is not None:  # bring the real tokens to the front; causality hides what is behind them
            first = attention_mask.to(torch.int64).argmax(1, keepdim=True)
            shift = torch.arange(slots, device=input_ids.device) + first
            input_ids = input_ids.gather(1, shift % slots)
        out = self.project(self.forward(input_ids, causal(slots, str(input_ids.device))))
        if shift is None:
            return out
        back = (torch.arange(slots, device=input_ids.device) - shift[:, :1]) % slots
        return out.gather(1, back[:, :, None].expand_as(out))

    def project(self, hidden: Tensor) -> Tensor:
        """The LM head: hidden [..., hidden] -> float32 logits [..., V]."""
        return self.lm_head(hidden).float()

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        cache: Cache | None = None,
        *,
        counts: list[int] | None = None,
        routes: list[Tensor] | None = None,
    ) -> Tensor:
        """Final hidden states [B, S, hidden] of int64 tokens [B, S] that follow the cached ones.

        The slots' keys, values and columns are written behind the cached ones, but the cache's lengths stay: the
        caller commits with `cache.advance`. `counts` gives the real leading slots per sequence of a ragged prefill.
        `routes` collects each layer's chosen expert, int64 [B * S].
        """
        batch, slots = tokens.shape
        frame = self._frame(layout, cache, batch, counts)
        decoder = self.model
        x = decoder.embed_tokens(tokens)
        residual = ((x + decoder.input_hidden_states_bias) * decoder.input_hidden_states_scale).float()
        mode = "loop" if torch.is_grad_enabled() else self.kernels.expert_mode(batch * slots)
        state = None
        for layer in decoder.layers:
            branch = layer.self_attn(layer.input_layernorm(residual), frame)
            residual = layer.post_attention_residual_scale(branch, residual)
            flat = layer.post_attention_layernorm(residual).view(batch * slots, -1)
            branch, state, chosen = layer.mlp(flat, state, mode)
            if routes is not None:
                routes.append(chosen)
            residual = layer.post_mlp_residual_scale(branch.view(batch, slots, -1), residual)
        return decoder.norm(residual)

    def _frame(self, layout: Layout, cache: Cache | None, batch: int, counts: list[int] | None) -> Frame:
        """Positions, masks and cache rows that all layers share."""
        config, slots = self.config, layout.slots
        device, dtype = self.model.embed_tokens.weight.device, self.model.embed_tokens.weight.dtype
        lengths = cache.lengths if cache is not None else [0] * batch
        require(len(lengths) == batch, f"the cache holds {len(lengths)} sequences, but got {batch}")
        longest = max(lengths)
        start = longest if min(lengths) == longest else None
        total = longest + slots
        if cache is not None:
            require(total <= cache.capacity, f"{total} positions do not fit the cache of {cache.capacity}")
        length = torch.tensor(lengths, device=device)[:, None]
        positions = layout.offsets + (longest if start is not None else length)
        if positions.dim() == 1:
            positions = positions[None]
        end = longest + slots
        rotary = {kind: self.rotary.factors(kind, positions, dtype, end) for kind in self._kinds}
        masks = {kind: self._mask(kind, layout, length, start, positions, dtype) for kind in self._kinds}
        frame = Frame(
            rotary=rotary,
            masks=masks,
            taps=None if layout.previous is None else predecessors(layout.previous, config.conv_history),
            committed=layout.committed,
            cache=cache,
            total=total,
            start=start,
            batch=torch.arange(batch, device=device)[:, None],
            rows=None,
            history_rows=None,
            ring_rows=None,
            ring_slots=None,
        )
        if cache is None:
            return frame
        base = torch.tensor(start, device=device) if start is not None else length
        if start is None:
            frame.rows = length + torch.arange(slots, device=device)
        frame.history_rows = (base + torch.arange(-config.conv_history, 0, device=device)) % cache.ring
        if counts is None and layout.committed <= cache.ring:
            if layout.committed:
                frame.ring_rows = (base + torch.arange(layout.committed, device=device)) % cache.ring
        else:  # a prefill: the last columns of every sequence; the others go to the entry that is never read
            real = torch.tensor(counts or [layout.committed] * batch, device=device)[:, None]
            kept = real - min(cache.ring, slots) + torch.arange(min(cache.ring, slots), device=device)
            frame.ring_rows = torch.where(kept < 0, cache.ring, (length + kept) % cache.ring)
            frame.ring_slots = kept.clamp_min(0)
        return frame

    def _mask(
        self,
        kind: str,
        layout: Layout,
        length: Tensor,
        start: int | None,
        positions: Tensor,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """What slots [B, S] at `positions` see of the T keys: cached tokens up to `length` [B, 1], then slots."""
        slots, window = layout.slots, self.config.sliding_window if kind == "hybrid_sliding" else None
        total = (int(length.max()) if start is None else start) + slots
        if start is not None and slots == 1 and (window is None or total <= window):
            return None
        device = length.device
        visible = layout.visible
        if visible is None:
            visible = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()
        if start is not None:
            visible = visible if visible.dim() == 3 else visible[None]
            seen = torch.cat([visible.new_ones(visible.shape[0], slots, start), visible], dim=-1)
            keys = torch.cat([torch.arange(start, device=device).expand(positions.shape[0], -1), positions], dim=-1)
        else:
            slot = torch.arange(total, device=device) - length  # [B, T]: which slot a cache row holds, if any
            index = slot.clamp(0, slots - 1)
            expanded = visible.expand(length.shape[0], slots, slots)
            among = expanded.gather(2, index[:, None].expand(-1, slots, -1))
            seen = (slot < 0)[:, None] | (among & ((slot >= 0) & (slot < slots))[:, None])
            own = positions.expand(len(length), -1).gather(1, index)
            keys = torch.where(slot < 0, torch.arange(total, device=device), own)
        if window is not None:
            seen = seen & (positions[:, :, None] - keys[:, None] < window)
        return attention_mask(seen, self.config.num_attention_heads // self.config.num_key_value_heads, dtype)
