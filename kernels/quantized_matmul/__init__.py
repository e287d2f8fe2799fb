"""A linear layer whose weight is held in 8 or 4 bits: for decoding, where reading the weight is the time."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.quantized_matmul.chunked import chunked
from kernels.quantized_matmul.quantize import check_group, quantize
from kernels.quantized_matmul.reference import reference

__all__ = ["quantize", "quantized_matmul"]


def _fake(x_ND: Tensor, packed_FP: Tensor, scales_FG: Tensor, zeros_FG: Tensor | None, bits: int, group: int) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], packed_FP.shape[0])


_op = op.Op("quantized_matmul", reference, chunked, _fake, differentiable=False)


def quantized_matmul(
    x_ND: Tensor, packed_FP: Tensor, scales_FG: Tensor, zeros_FG: Tensor | None = None, *, bits: int = 8
) -> Tensor:
    """y (N, F) = x W^T with W_fd = (q_fd - zero_fg) scale_fg, g = d // group; no gradients.

    x (N, D) floating, which y's dtype is. packed, scales (F, G) and zeros (F, G) or None as `quantize` makes them, D/G
    being the group: int8 (F, D) for 8 bits; uint8 (F, D / 2) for 4, where the zero is 8 if there are no zeros.
    Sums in fp32 (fp64 for fp64). A CPU is fast in bf16 with whole rows as groups for 8 bits, groups of 32 to 256 for 4.
    Raises ValueError or TypeError naming the argument.
    """
    name = "quantized_matmul"
    check.shape(name, "x_ND", x_ND, (None, None), "(N, D)")
    check.floating(name, "x_ND", x_ND)
    dim = x_ND.shape[1]
    if bits not in (8, 4):
        raise ValueError(f"{name}: bits={bits} must be 8 or 4")
    size = dim * bits // 8
    check.shape(name, "packed_FP", packed_FP, (None, size), f"(F, {size}), D={dim} numbers of {bits} bits a row")
    check.dtype(name, "packed_FP", packed_FP, torch.int8 if bits == 8 else torch.uint8)
    check.device(name, "packed_FP", packed_FP, x_ND)
    rows = len(packed_FP)
    check.shape(name, "scales_FG", scales_FG, (rows, None), f"(F={rows}, G), F from packed_FP")
    groups = scales_FG.shape[1]
    for label, value in (("scales_FG", scales_FG), ("zeros_FG", zeros_FG)):
        if value is not None:
            check.shape(name, label, value, (rows, groups), f"(F={rows}, G={groups})")
            check.floating(name, label, value)
            check.device(name, label, value, x_ND)
    if not groups or dim % groups:
        raise ValueError(f"{name}: scales_FG has G={groups} groups, which must divide D={dim}")
    check_group(name, bits, dim // groups, dim)
    return _op(x_ND, packed_FP, scales_FG, zeros_FG, bits, dim // groups)
