"""Keys of length one, so that a delta rule takes back exactly what a key holds."""

import torch
from torch import Tensor


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension, in fp32; dtype of x."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
