"""Convolution with a long filter, the definition: y_t = sum_{j <= t} filter_j x_{t-j} + skip x_t."""

import torch
from torch import Tensor


def reference(x_BTD: Tensor, filter_DL: Tensor, skip_D: Tensor | None) -> Tensor:
    """y (B, T, D) in x's dtype; one step for each place of the filter."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    x, weight = x_BTD.to(wide), filter_DL.to(wide)
    tokens = x.shape[1]
    y = torch.zeros_like(x) if skip_D is None else x * skip_D.to(wide)
    for j in range(min(tokens, weight.shape[1])):
        y = y + torch.nn.functional.pad(x[:, : tokens - j] * weight[:, j], (0, 0, j, 0))
    return y.to(x_BTD.dtype)
