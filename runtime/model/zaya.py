"""The ZAYA decoder in plain torch: module and parameter names are those of the published checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from runtime.cache import Cache
from runtime.config import ExpertMode, KernelConfig, ModelConfig, require
from runtime.layout import Layout, causal
from runtime.model.attention import Attention
from runtime.model.frame import Frame, build_frame
from runtime.model.layers import Derived, ResidualScaling, RMSNorm
from runtime.model.moe import MoE
from runtime.model.rotary import Rotary

T = TypeVar("T")


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

    def run(
        self, residual: Tensor, state: Tensor | None, frame: Frame, mode: ExpertMode
    ) -> tuple[Tensor, Tensor, Tensor]:
        """residual fp32 [B, S, hidden], router state [B * S, router] -> both behind this layer, chosen expert [B * S].

        `forward` of the parts is called directly: the hooks of nn.Module cost more than a small operator.
        """
        batch, slots, hidden = residual.shape
        branch = self.self_attn.forward(self.input_layernorm.forward(residual), frame)
        residual = self.post_attention_residual_scale.forward(branch, residual)
        flat = self.post_attention_layernorm.forward(residual).view(batch * slots, hidden)
        branch, state, chosen = self.mlp.forward(flat, state, mode)
        return self.post_mlp_residual_scale.forward(branch.view(batch, slots, hidden), residual), state, chosen


class Decoder(nn.Module):
    """Everything before the LM head, under the published prefix `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        if not weight.is_meta:  # where there is nothing to draw, drawing imports torch._dynamo: more than a second
            self.embed_tokens.reset_parameters()
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_hidden_states_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.input_hidden_states_bias = nn.Parameter(torch.zeros(config.hidden_size))

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [...] -> the first residual, fp32 [..., hidden]."""
        x = self.embed_tokens(tokens)
        return ((x + self.input_hidden_states_bias) * self.input_hidden_states_scale).float()


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
        self.stack: list[Layer] = [layer for layer in self.model.layers if isinstance(layer, Layer)]
        self._packed: dict[Callable[[Zaya], Any], Any] = {}
        self.leased: Any = None  # a cache and who uses it: `runtime.graphs.lease`

    def freeze(self) -> Zaya:
        """Derive the inference weights and stop gradients. Returns self."""
        self.requires_grad_(False).train(False)
        for module in self.modules():
            if isinstance(module, Derived):
                module.freeze()
        return self

    def train(self, mode: bool = True) -> Zaya:
        """Parameters may change from here on, so derived weights are dropped."""
        self._thaw()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Zaya:
        """What `to`, `float`, `cuda` and their like call: weights derived before would be of the old type or place."""
        frozen = any(isinstance(module, Derived) and module.frozen for module in self.modules())
        self._thaw()
        super()._apply(fn, recurse)
        return self.freeze() if frozen else self

    def _thaw(self) -> None:
        for module in self.modules():
            if isinstance(module, Derived):
                module.thaw()
        self._packed.clear()
        self.leased = None

    def packed(self, pack: Callable[[Zaya], T]) -> T:
        """What `pack` makes of this model's frozen weights, made once; forgotten when parameters may change."""
        if pack not in self._packed:
            self._packed[pack] = pack(self)
        return self._packed[pack]  # type: ignore[no-any-return]

    def new_cache(self, batch: int, capacity: int, max_slots: int, *, rows: int | None = None) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` positions, scratch slots included.

        max_slots: the most slots of one forward that may be kept. rows: the most sequences it can come to hold.
        """
        weight = self.model.embed_tokens.weight
        return Cache(self.config, batch, capacity, max_slots, rows=rows, dtype=weight.dtype, device=str(weight.device))

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
        if self.kernels.engine == "lean" and not torch.is_grad_enabled():
            from runtime.engines import project

            return project(self, hidden)
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
        """The hidden states of `run`. `routes` collects each layer's chosen expert, int64 [B * S]."""
        hidden, chosen = self.run(tokens, layout, cache, counts=counts)
        if routes is not None:
            routes.extend(chosen.long())
        return hidden

    def run(
        self, tokens: Tensor, layout: Layout, cache: Cache | None = None, *, counts: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states [B, S, hidden] and chosen experts int [layers, B * S] of int64 tokens [B, S] that follow
        the cached ones.

        The slots' keys, values and columns are written behind the cached ones, but the cache's lengths stay: the
        caller commits with `cache.advance`. `counts` gives the real leading slots per sequence of a ragged prefill;
        what is behind them is undefined.
        """
        if cache is not None and self.kernels.engine != "eager" and not torch.is_grad_enabled():
            from runtime.engines import run  # which imports this module

            found = run(self, tokens, layout, cache, counts)
            if found is not None:
                return found
        batch, slots = tokens.shape
        decoder = self.model
        dtype = decoder.embed_tokens.weight.dtype
        frame = build_frame(self.config, self.rotary, layout, cache, batch=batch, counts=counts, dtype=dtype)
        residual = decoder.embed(tokens)
        mode = "loop" if torch.is_grad_enabled() else self.kernels.expert_mode(batch * slots)
        state, routes = None, []
        for layer in self.stack:
            residual, state, chosen = layer.run(residual, state, frame, mode)
            routes.append(chosen)
        return decoder.norm(residual), torch.stack(routes)
