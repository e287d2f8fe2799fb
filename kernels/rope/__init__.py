"""Rotary position embedding by given angles: pairs of channels of each head turn."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.rope.angles import rope_angles
from kernels.rope.chunked import chunked, grad
from kernels.rope.reference import reference

__all__ = ["rope", "rope_angles"]


def _fake(x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(x_BTHK, memory_format=torch.contiguous_format)


_op = op.Op("rope", reference, chunked, _fake, grad=grad, twice=reference)


def rope(x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False) -> Tensor:
    """Pair i of each head turned: (a, b) -> (a cos_i - b sin_i, b cos_i + a sin_i) (arXiv 2104.09864).

    x (B, T, H, K); cos and sin (B or 1, T, R), 2R <= K: pairs are channels (i, i + R), or (2i, 2i + 1) interleaved, of
    the first 2R channels, and the others pass. An amplitude is folded into cos and sin. Computed in fp32 (fp64 for
    fp64), result in x.dtype. Gradients for x, cos and sin. Raises ValueError or TypeError naming the argument.
    """
    check.shape("rope", "x_BTHK", x_BTHK, (None,) * 4, "(B, T, H, K)")
    check.floating("rope", "x_BTHK", x_BTHK)
    rows, tokens, _, size = x_BTHK.shape
    for name, angle in (("cos_BTR", cos_BTR), ("sin_BTR", sin_BTR)):
        check.shape("rope", name, angle, (None, tokens, None), f"(B or 1, T={tokens}, R)")
        check.floating("rope", name, angle)
        check.device("rope", name, angle, x_BTHK)
        if len(angle) not in (1, rows):
            raise ValueError(f"rope: {name} must have B={rows} rows or 1, got {len(angle)}")
        if 2 * angle.shape[-1] > size:
            raise ValueError(f"rope: {name} has {angle.shape[-1]} pairs, but x_BTHK has only K={size} channels")
    if cos_BTR.shape[-1] != sin_BTR.shape[-1]:
        raise ValueError(f"rope: sin_BTR has {sin_BTR.shape[-1]} pairs, cos_BTR {cos_BTR.shape[-1]}")
    return _op(x_BTHK, cos_BTR, sin_BTR, interleaved)
