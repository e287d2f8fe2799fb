"""Products with a weight of few bits for CPUs: torch's kernels for bf16, else a block of rows widened at a time.

torch's 4-bit product wants a layout of its own, which differs between CPUs: a weight is laid out at its first call and
the result kept for as long as the weight lives.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.quantized_matmul.reference import SYMMETRIC, numbers, widened

BLOCK = 1 << 18  # numbers widened at a time, which stay in the cache
_laid_out = WeakTensorKeyDictionary()


def chunked(
    x_ND: Tensor, packed_FP: Tensor, scales_FG: Tensor, zeros_FG: Tensor | None, bits: int, group: int
) -> Tensor:
    """As `reference`."""
    narrow = x_ND.dtype == torch.bfloat16 and x_ND.is_cpu and x_ND.numel() and packed_FP.numel()
    rows, dim = len(packed_FP), x_ND.shape[1]
    if narrow and bits == 8 and group == dim and zeros_FG is None and not dim % 32:  # else it reads past the end
        scales_F = scales_FG[:, 0].to(x_ND.dtype)
        return torch.ops.aten._weight_int8pack_mm(x_ND.contiguous(), packed_FP.contiguous(), scales_F)
    # Tensors made in inference mode do not say when they change, so that no layout of theirs can be kept.
    counted = not any(x is not None and x.is_inference() for x in (packed_FP, scales_FG, zeros_FG))
    if narrow and bits == 4 and group in (32, 64, 128, 256) and not rows % 16 and counted:
        layout, scales_GF2 = _layout(packed_FP, scales_FG, zeros_FG)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_ND.contiguous(), layout, group, scales_GF2)
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    x, y_NF = x_ND.to(wide), x_ND.new_empty(len(x_ND), rows, dtype=wide)
    size = max(1, BLOCK // max(1, dim))
    for start in range(0, rows, size):
        block = slice(start, start + size)
        zeros = None if zeros_FG is None else zeros_FG[block]
        y_NF[:, block] = x @ widened(packed_FP[block], scales_FG[block], zeros, bits, group, wide).T
    return y_NF.to(x_ND.dtype)


def _layout(packed_FP: Tensor, scales_FG: Tensor, zeros_FG: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch's layout of the numbers, and (scale, offset) of each: it computes (q - 8) scale + offset."""
    of = tuple(None if x is None else (x.data_ptr(), x._version) for x in (packed_FP, scales_FG, zeros_FG))
    kept = _laid_out.get(packed_FP)
    if kept is None or kept[0] != of:
        layout = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers(packed_FP, 4).int(), 1)
        offset = torch.zeros_like(scales_FG) if zeros_FG is None else (SYMMETRIC[4] - zeros_FG) * scales_FG
        kept = of, layout, torch.stack([scales_FG.T, offset.T], -1).to(torch.bfloat16).contiguous()
        _laid_out[packed_FP] = kept
    return kept[1:]
