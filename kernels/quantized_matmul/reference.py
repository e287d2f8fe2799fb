"""Products with a weight of few bits, the definition."""

import torch
from torch import Tensor

SYMMETRIC = {8: 0, 4: 8}  # the number that stands for 0 where no zeros are given


def reference(
    x_ND: Tensor, packed_FP: Tensor, scales_FG: Tensor, zeros_FG: Tensor | None, bits: int, group: int
) -> Tensor:
    """y = x W^T with W = (q - zero) scale, in fp32 at least, rounded once."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    return (x_ND.to(wide) @ widened(packed_FP, scales_FG, zeros_FG, bits, group, wide).T).to(x_ND.dtype)


def widened(
    packed_FP: Tensor, scales_FG: Tensor, zeros_FG: Tensor | None, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """The weight (F, D) that the numbers stand for."""
    numbers_FGS = numbers(packed_FP, bits).to(dtype).unflatten(1, (-1, group))
    numbers_FGS -= SYMMETRIC[bits] if zeros_FG is None else zeros_FG.to(dtype)[..., None]
    return numbers_FGS.mul_(scales_FG.to(dtype)[..., None]).flatten(1)


def numbers(packed_FP: Tensor, bits: int) -> Tensor:
    """What is packed: (F, D) of 8-bit numbers as they are; of 4-bit ones two in a byte, the first in its low half."""
    return packed_FP if bits == 8 else torch.stack([packed_FP & 15, packed_FP >> 4], -1).flatten(1)
