"""Sparse softmax, the definition."""

import torch
from torch import Tensor


def reference(x: Tensor, alpha: float) -> Tensor:
    """y_i = relu((alpha - 1) x_i - t)^(1 / (alpha - 1)), with t such that the row's sum is 1; -inf gives 0.

    t by halving an interval until nothing changes, then two of Newton's steps, which carry its first two derivatives.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    z = (alpha - 1) * (wide - wide.detach().amax(-1, keepdim=True)) if x.numel() else wide
    power, still = 1 / (alpha - 1), z.detach()
    low = still.new_full((*x.shape[:-1], 1), -1.0)
    size = 1.0
    for _ in range(60):
        size /= 2
        low = torch.where((still - low - size).relu().pow(power).sum(-1, keepdim=True) >= 1, low + size, low)
    t = low
    for _ in range(2):
        over = z - t
        inside = over > 0
        over = over.masked_fill(~inside, 1)
        total = over.pow(power).masked_fill(~inside, 0).sum(-1, keepdim=True)
        slope = power * over.pow(power - 1).masked_fill(~inside, 0).sum(-1, keepdim=True)
        t = t + (total - 1) / slope
    over = z - t
    return torch.where(over > 0, over.masked_fill(over <= 0, 1).pow(power), 0).to(x.dtype)
