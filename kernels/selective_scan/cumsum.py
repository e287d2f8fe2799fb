"""The selective scan's recurrence by cumulative sums in short chunks: h_t = e^(g_t) (h_0 + sum_{i<=t} e^(-g_i) x_i).

g is the sum of the logarithms of the decays since the chunk began. In float64, with decays no smaller than e^-40, which
is 0 next to what is added, a chunk's e^(-g) stays below e^640 and cannot overflow.
"""

import torch
from torch import Tensor

CHUNK = 16
FLOOR = -40.0


def cumsum(log_a: Tensor, a: Tensor, x: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """h of h_t = a_t h_{t-1} + x_t (of h_{t+1} if reverse); all (B, T, C), start (B, C)."""
    if reverse:
        return cumsum(log_a.flip(1), a, x.flip(1), start, False).flip(1)
    h, made = start.double(), []
    for log_a_chunk, x_chunk in zip(log_a.split(CHUNK, 1), x.split(CHUNK, 1), strict=True):
        g = log_a_chunk.double().clamp(min=FLOOR).cumsum(1)
        lines = g.exp() * (h[:, None] + ((-g).exp() * x_chunk).cumsum(1))
        made.append(lines.to(x.dtype))
        h = lines[:, -1]
    return torch.cat(made, 1)
