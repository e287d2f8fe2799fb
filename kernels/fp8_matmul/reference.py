"""Products of 8-bit floating-point matrices, the definition."""

import torch
from torch import Tensor

BLOCK = 128  # rows or columns that share a scale where scales are of blocks


def reference(a_MK: Tensor, b_KN: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: str) -> Tensor:
    """The sum over blocks of K of a's times b's, each times its scales; in fp32 at least, rounded once.

    scale_a (1 or M, 1 or blocks of K); scale_b (1 or blocks of K, 1 or N or blocks of N).
    """
    out = getattr(torch, dtype)
    wide = torch.promote_types(out, torch.float32)
    size = b_KN.shape[1]
    y_MN = torch.zeros(len(a_MK), size, dtype=wide, device=a_MK.device)
    for i, start in enumerate(range(0, a_MK.shape[1], BLOCK)):
        block = slice(start, start + BLOCK)
        of_a = scale_a[:, min(i, scale_a.shape[1] - 1), None].to(wide)
        of_b = columns(scale_b, size)[min(i, len(scale_b) - 1)].to(wide)
        y_MN = y_MN + a_MK[:, block].to(wide) @ b_KN[block].to(wide) * of_a * of_b
    return y_MN.to(out)


def columns(scale_b: Tensor, size: int) -> Tensor:
    """scale_b with a column for each of b's, or one for all."""
    if scale_b.shape[1] in (1, size):
        return scale_b
    return scale_b.repeat_interleave(BLOCK, 1)[:, :size]
