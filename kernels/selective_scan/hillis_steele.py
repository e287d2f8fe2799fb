"""The selective scan's recurrence by doubling (Hillis and Steele): after n rounds each h holds the last 2^n tokens."""

import torch
from torch import Tensor


def hillis_steele(log_a: Tensor, a: Tensor, x: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """h of h_t = a_t h_{t-1} + x_t (of h_{t+1} if reverse); all (B, T, C), start (B, C)."""
    if reverse:
        return hillis_steele(log_a, a.flip(1), x.flip(1), start, False).flip(1)
    h = torch.cat([x[:, :1] + a[:, :1] * start[:, None], x[:, 1:]], 1)
    reach = 1
    while reach < h.shape[1]:
        h = torch.cat([h[:, :reach], h[:, reach:] + a[:, reach:] * h[:, :-reach]], 1)
        a = torch.cat([a[:, :reach], a[:, reach:] * a[:, :-reach]], 1)
        reach *= 2
    return h
