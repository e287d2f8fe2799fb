"""Products of 8-bit floating-point matrices on CPUs, which have no such arithmetic: one product of widened operands."""

import torch
from torch import Tensor

from kernels.fp8_matmul.reference import BLOCK, columns


def chunked(a_MK: Tensor, b_KN: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: str) -> Tensor:
    """As `reference`. Scales of whole rows and columns meet the product, those of blocks the operands."""
    out = getattr(torch, dtype)
    wide = torch.promote_types(out, torch.float32)
    a_MK, b_KN, scale_a = a_MK.to(wide), b_KN.to(wide), scale_a.to(wide)
    scale_b = columns(scale_b.to(wide), b_KN.shape[1])
    blocked_a, blocked_b = scale_a.shape[1] > 1, len(scale_b) > 1
    if blocked_a:
        a_MK = a_MK.mul_(scale_a.repeat_interleave(BLOCK, 1)[:, : a_MK.shape[1]])
    if blocked_b:
        b_KN = b_KN.mul_(scale_b.repeat_interleave(BLOCK, 0)[: len(b_KN)])
    y_MN = a_MK @ b_KN
    y_MN = y_MN if blocked_a else y_MN.mul_(scale_a)
    return (y_MN if blocked_b else y_MN.mul_(scale_b)).to(out)
