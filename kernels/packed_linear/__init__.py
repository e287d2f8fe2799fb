"""A linear layer for decoding on a CPU: the weight is packed once, and reading it is what a call costs.

Its definition is that of a linear layer with the weight that `unpack` gives. It has no other form: a GPU decodes with
plain products or `quantized_matmul`.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels import check, cpu
from kernels.packed_linear.layout import BITS, Packed, pack, rows, unpack

__all__ = ["BITS", "Packed", "pack", "packed_linear", "rows", "unpack"]


def packed_linear(x: Tensor, packed: Packed, bias_F: Tensor | None = None) -> Tensor:
    """y (..., F) = x W^T + bias in x's dtype, W (F, D) held by `packed`; forward only.

    x (..., D) of the weight's dtype; float32 or bfloat16 where it has 8 or 4 bits, and then x too is rounded to 8 bits,
    a scale for each 64 numbers of a row. bias (F) float32. Sums in fp32, each in an order that neither the number of
    rows nor the others among them change: a row's result is its own, bit for bit.
    Raises ValueError or TypeError naming the argument.
    """
    name = "packed_linear"
    wanted = {32: (torch.float32,), 16: (torch.bfloat16,)}.get(packed.bits, (torch.float32, torch.bfloat16))
    check.dtype(name, "x", x, *wanted)
    if x.shape[-1:] != (packed.dim,):
        raise ValueError(f"{name}: x must be (..., D={packed.dim}), got shape {tuple(x.shape)}")
    if bias_F is not None:
        check.shape(name, "bias_F", bias_F, (packed.size,), f"(F={packed.size},)")
        check.dtype(name, "bias_F", bias_F, torch.float32)
    if x.device.type == "cpu" and cpu.available():
        return torch.ops.edifice_cpu.packed_linear(
            x, packed.weight, packed.scales_PGN, bias_F, packed.size, packed.bits
        )
    return plain(x, packed, bias_F)


def plain(x: Tensor, packed: Packed, bias_F: Tensor | None = None) -> Tensor:
    """The same in plain torch, without rounding x."""
    y = linear(x, unpack(packed, x.dtype))
    return y if bias_F is None else (y + bias_F).to(x.dtype)
