"""Weights rounded to 8 or 4 bits, a scale for each group of numbers."""

import torch
from torch import Tensor

from kernels import check
from kernels.quantized_matmul.reference import SYMMETRIC


def quantize(
    weight_FD: Tensor, *, bits: int = 8, group: int = 0, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(packed, scales, zeros) of a weight (F, D) for `quantized_matmul`: each number rounded to the nearest.

    group: numbers of a row that share a scale, a divisor of D; 0 for a whole row. scales (F, D / group) in the weight's
    dtype. symmetric: numbers from -127 to 127, or -7 to 7, and no zeros; else the range of each group is covered with
    all 256 or 16, and zeros (F, D / group), whole numbers, say which one stands for 0.
    packed: int8 (F, D); for 4 bits uint8 (F, D / 2), two numbers 0..15 in a byte, the first in its low half.
    """
    check.shape("quantize", "weight_FD", weight_FD, (None, None), "(F, D)")
    check.floating("quantize", "weight_FD", weight_FD)
    dim = weight_FD.shape[1]
    check_group("quantize", bits, group or dim, dim)
    wide_FGS = (
        weight_FD.detach().to(torch.promote_types(weight_FD.dtype, torch.float32)).unflatten(1, (-1, group or dim))
    )
    low = -(2 ** (bits - 1)) if bits == 8 else 0
    most, tiny = 2**bits - 1, torch.finfo(weight_FD.dtype).tiny
    if weight_FD.dtype == torch.float16:
        tiny *= torch.finfo(torch.float16).eps  # the smallest of all: common weights have scales below the normal ones
    if symmetric:
        scale = (wide_FGS.abs().amax(2, keepdim=True) / (most // 2)).clamp(min=tiny)
        zero = torch.full_like(scale, SYMMETRIC[bits])
    else:
        least, largest = wide_FGS.amin(2, keepdim=True).clamp(max=0), wide_FGS.amax(2, keepdim=True).clamp(min=0)
        scale = ((largest - least) / most).clamp(min=tiny)
        zero = (low - least / scale).round()
    scale = scale.to(weight_FD.dtype)
    if symmetric:
        # A scale rounded down must not push the largest number past the end.
        ends = SYMMETRIC[bits] - most // 2, SYMMETRIC[bits] + most // 2
    else:
        ends = low, low + most
        zero = zero.clamp(*ends)
    numbers_FD = ((wide_FGS / scale.to(wide_FGS.dtype)).round() + zero).clamp(*ends).flatten(1)
    zeros = None if symmetric else zero[..., 0].to(weight_FD.dtype)
    if bits == 8:
        return numbers_FD.to(torch.int8), scale[..., 0], zeros
    nibbles = numbers_FD.to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scale[..., 0], zeros


def check_group(op: str, bits: int, group: int, dim: int) -> None:
    """Raise unless rows of `dim` numbers of so many bits fall into such groups."""
    if bits not in (8, 4):
        raise ValueError(f"{op}: bits={bits} must be 8 or 4")
    if bits == 4 and dim % 2:
        raise ValueError(f"{op}: D={dim} must be even for bits=4, of which two share a byte")
    if group < 1 or dim % group or (group != dim and group % 32):
        raise ValueError(f"{op}: group={group} must divide D={dim} and be a multiple of 32, or be D")
