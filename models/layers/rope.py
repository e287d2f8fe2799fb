"""Rotary position embedding (arXiv 2104.09864): scores depend on the distance of two tokens only.

Pairs are (i, i + K/2), as in Llama checkpoints. Angles are computed from positions in fp32 at each call: a table kept
as a buffer would be rounded whenever a model is cast to bf16.
"""

import torch
from torch import Tensor


def rotate(x_BTHK: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """x with each pair turned by position * theta^(-2i/K); dtype of x, angles in fp32. K must be even."""
    half = x_BTHK.shape[-1] // 2
    frequency_K = theta ** (-torch.arange(half, device=x_BTHK.device, dtype=torch.float32) / half)
    angle_BT1K = positions_BT[:, :, None, None].float() * frequency_K
    cos, sin = angle_BT1K.cos(), angle_BT1K.sin()
    first, second = x_BTHK.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BTHK.dtype)
