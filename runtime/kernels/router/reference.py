"""The router of one layer in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.model.layers import rms_norm
from runtime.model.moe import RouterWeights


def router(
    x: Tensor, state: Tensor | None, weights: RouterWeights, active: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The expert of each token int32 [N], its unbiased probability [N], and the state for the next layer [N, R].

    x [N, H]; state: the previous layer's [N, R], None in the first; active: int32 [1], from where on tokens are
    padding, whose expert is E, the skip expert, so that they read no weights.
    """
    shares, state = probabilities(x, state, weights)
    chosen = (shares.float() + weights.balancing).argmax(-1)
    probability = shares.gather(-1, chosen[:, None]).squeeze(-1)
    if active is not None:
        padding = torch.arange(x.shape[0], device=x.device) >= active
        chosen = chosen.masked_fill(padding, weights.out.shape[0] - 1)
    return chosen.to(torch.int32), probability, state


def probabilities(x: Tensor, state: Tensor | None, weights: RouterWeights) -> tuple[Tensor, Tensor]:
    """The softmax over the experts and the skip expert [N, E + 1], and the state for the next layer [N, R]."""
    w = weights
    own = F.linear(x, w.down, w.down_bias)
    state = own if state is None else torch.addcmul(own, state, w.state_scale)
    inner = F.gelu(F.linear(rms_norm(state, w.norm_eps) * w.norm, w.fc1, w.fc1_bias))
    return torch.softmax(F.linear(F.gelu(F.linear(inner, w.fc2, w.fc2_bias)), w.out), dim=-1), state
