"""Rotary position embedding, the definition."""

import torch
from torch import Tensor


def reference(x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
    """The first 2R channels of x turned pair by pair, the rest as they are; in fp32 at least, rounded once."""
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    pairs = cos_BTR.shape[-1]
    turned, rest = x_BTHK[..., : 2 * pairs].to(wide), x_BTHK[..., 2 * pairs :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    cos, sin = cos_BTR.to(wide)[:, :, None], sin_BTR.to(wide)[:, :, None]
    ends = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(ends, -1).flatten(-2) if interleaved else torch.cat(ends, -1)
    return torch.cat([turned.to(x_BTHK.dtype), rest], -1)
