"""The router (an MLP with a state that runs across layers) and the top-1 experts, in four ways of running them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.config import ExpertMode, ModelConfig
from runtime.model.layers import Derived, RMSNorm, rms_norm


class RouterMLP(nn.Module):
    """Norm, two GELU layers, and one output per expert and for the skip expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.router_hidden_size
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, config.num_experts + 1, bias=False)


class RouterWeights(NamedTuple):
    """The router's parameters as plain tensors."""

    down: Tensor
    down_bias: Tensor
    state_scale: Tensor | None  # None in layer 0, which has no state to take over
    norm: Tensor
    norm_eps: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    out: Tensor
    balancing: Tensor


class Router(Derived):
    """Top-1 on probability + balancing bias; class `num_experts` is the skip expert, which contributes nothing."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.down_proj = nn.Linear(config.hidden_size, config.router_hidden_size)
        if layer > 0:
            self.router_states_scale = nn.Parameter(torch.ones(config.router_hidden_size))
        self.router_mlp = RouterMLP(config)
        biases = torch.zeros(config.num_experts + 1)
        biases[-1] = -1.0
        self.register_buffer("balancing_biases", biases)
        self.balancing_biases: Tensor

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Router:
        """Routing is decided in fp32 whatever the weights' type, so the biases only move."""
        biases = self.balancing_biases
        super()._apply(fn, recurse)
        if self.balancing_biases.dtype != torch.float32:
            self.balancing_biases = biases.to(self.balancing_biases.device, torch.float32)
        return self

    def derive(self) -> RouterWeights:
        """The parameters, and eps as a tensor."""
        mlp = self.router_mlp
        return RouterWeights(
            self.down_proj.weight,
            self.down_proj.bias,
            getattr(self, "router_states_scale", None),
            *mlp.norm.derive(),
            mlp.fc1.weight,
            mlp.fc1.bias,
            mlp.fc2.weight,
            mlp.fc2.bias,
            mlp.out_proj.weight,
            self.balancing_biases,
        )

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden], the previous layer's state [T, router] -> expert [T], its probability [T], the next state."""
        w = self.weights()
        own = F.linear(x, w.down, w.down_bias)
        state = own if state is None else torch.addcmul(own, state, w.state_scale)
        inner = F.gelu(F.linear(rms_norm(state, w.norm_eps) * w.norm, w.fc1, w.fc1_bias))
        probability = torch.softmax(F.linear(F.gelu(F.linear(inner, w.fc2, w.fc2_bias)), w.out), dim=-1)
        chosen = (probability.detach().float() + w.balancing).argmax(-1)
        weight = probability.gather(-1, chosen[:, None]).squeeze(-1)
        return chosen, weight, state


class Experts(Derived):
    """SwiGLU experts as stacked weights: gate_up_proj [E, 2 * width, hidden], down_proj [E, hidden, width]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden, width))
        self._dense_down: Tensor | None = None

    def derive(self) -> tuple[Tensor, Tensor]:
        """The stacked weights."""
        return self.gate_up_proj, self.down_proj

    def thaw(self) -> None:
        """Forget the derived weights: parameters may change again."""
        super().thaw()
        self._dense_down = None

    def forward(self, x: Tensor, chosen: Tensor, weight: Tensor, mode: ExpertMode) -> Tensor:
        """x [T, hidden], chosen int64 [T], weight [T] -> [T, hidden]; rows of the skip expert are zero."""
        return getattr(self, f"_{mode}")(x, chosen, weight)

    def _loop(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        order = chosen.argsort()
        counts = torch.bincount(chosen, minlength=self.num_experts + 1).tolist()
        parts = []
        for expert, part in enumerate(x[order].split(counts)):
            if expert == self.num_experts or not counts[expert]:
                parts.append(torch.zeros_like(part))
                continue
            gate, up = F.linear(part, self.gate_up_proj[expert]).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
        return torch.cat(parts)[order.argsort()] * weight[:, None]

    def _grouped(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        order = chosen.argsort()
        ends = torch.bincount(chosen, minlength=self.num_experts + 1).cumsum(0)[:-1].to(torch.int32)
        real = int(ends[-1])  # behind them lie the rows of the skip expert
        rows = x[order[:real]]
        gate, up = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_copy_(0, order[:real], rows) * weight[:, None]

    def _gather(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        if x.shape[0] == 1:
            expert = int(chosen)
            if expert == self.num_experts:
                return torch.zeros_like(x)
            gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, self.down_proj[expert]) * weight
        skipped = chosen == self.num_experts
        index = chosen.masked_fill(skipped, 0)
        gate, up = torch.bmm(self.gate_up_proj[index], x[:, :, None]).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(self.down_proj[index], (F.silu(gate) * up)[:, :, None]).squeeze(-1)
        return out * weight.masked_fill(skipped, 0)[:, None]

    def _dense(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Every expert on every token; the weights of the others are zero, so the sum over experts selects."""
        if self._dense_down is None or torch.is_grad_enabled():
            self._dense_down = self.down_proj.transpose(0, 1).flatten(1).contiguous()
        experts, double, hidden = self.gate_up_proj.shape
        gate, up = F.linear(x, self.gate_up_proj.view(experts * double, hidden)).view(-1, experts, double).chunk(2, -1)
        share = x.new_zeros(x.shape[0], experts + 1).scatter_(1, chosen[:, None], weight[:, None])[:, :-1]
        return F.linear((F.silu(gate) * up * share[:, :, None]).flatten(1), self._dense_down)


class MoE(nn.Module):
    """Router and experts of one layer, under their published names."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.gate = Router(config, layer)
        self.experts = Experts(config)

    def forward(self, x: Tensor, state: Tensor | None, mode: ExpertMode) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> output [T, hidden], the router state for the next layer, the chosen expert [T]."""
        chosen, weight, state = self.gate.forward(x, state)
        return self.experts.forward(x, chosen, weight, mode), state, chosen
