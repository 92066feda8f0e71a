"""The experts in plain torch, without reading a value on the host: what the kernel must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def experts(x: Tensor, chosen: Tensor, probability: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The chosen expert of every token, times its probability; rows of the skip expert (number E) are zero.

    x [N, H], chosen int32 [N], probability [N], gate_up [E, 2I, H], down [E, H, I] -> [N, H]. Few tokens gather a copy
    of their experts; many run through every expert, so that memory stays small and no shape depends on the routing.
    """
    count = down.shape[0]
    skipped = chosen >= count
    if x.shape[0] < count:
        index = chosen.masked_fill(skipped, 0).long()
        gate, up = torch.bmm(gate_up[index], x[:, :, None]).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(down[index], (F.silu(gate) * up)[:, :, None]).squeeze(-1)
    else:
        out = torch.zeros_like(x)
        for expert in range(count):
            gate, up = F.linear(x, gate_up[expert]).chunk(2, dim=-1)
            out = torch.where((chosen == expert)[:, None], F.linear(F.silu(gate) * up, down[expert]), out)
    return (out * probability[:, None]).masked_fill(skipped[:, None], 0)
