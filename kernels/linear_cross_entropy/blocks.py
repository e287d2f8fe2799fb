"""What both forms share: the walk over blocks of tokens, so that the logits of one block are all that exists.

Gradients are made on the way forward, while a block's logits are there: making them again in backward would cost a
fourth product where three are needed. They are those of the sum of the losses, and backward scales them. That is exact
for x, whose rows scale one by one; and for the weight where all losses have one gradient, as in a mean over tokens. For
other gradients backward makes the weight's once more.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.linear_cross_entropy.reference import IGNORE, check_targets, looked_at


def walk(args, rows: Callable, size: int, scale_N: Tensor | None, want: tuple[bool, bool, bool]) -> list[Tensor | None]:
    """Losses (N), dx (N, D) and dweight (C, D), each or None as `want` says.

    rows:  (logits, targets, scale or None, options, losses or None, dtype or None) -> the gradient of the logits of a
           block of tokens in that dtype, if any; writes the losses.
    size:  tokens of a block. scale_N: what each token's gradient is multiplied with.
    """
    x_ND, weight_CD, targets_N, options = *args[:3], args[3:6]
    check_targets(targets_N, len(weight_CD))
    # Tensor cores take narrow operands and add up in fp32; elsewhere they are widened. A narrow gradient of the weight
    # is rounded once per block: one in fp32 would be the largest tensor of all, read and written for each block.
    narrow = x_ND.is_cuda and x_ND.dtype == weight_CD.dtype and x_ND.dtype in (torch.bfloat16, torch.float16)
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    given, dtype = weight_CD.dtype, x_ND.dtype if narrow else wide
    weight_CD = weight_CD.to(dtype)
    losses_N = x_ND.new_zeros(len(x_ND), dtype=wide) if want[0] else None
    dx_ND = torch.zeros_like(x_ND, memory_format=torch.contiguous_format) if want[1] else None
    dw_CD = torch.zeros_like(weight_CD, memory_format=torch.contiguous_format) if want[2] else None
    for start in range(0, len(x_ND), size):
        block = slice(start, start + size)
        x = looked_at(x_ND[block], targets_N[block]).to(dtype)
        logits = torch.mm(x, weight_CD.T, out_dtype=wide) if narrow else x @ weight_CD.T
        scale = None if scale_N is None else scale_N[block]
        losses = None if losses_N is None else losses_N[block]
        d = rows(logits, targets_N[block], scale, options, losses, dtype if want[1] or want[2] else None)
        del logits
        if want[1]:
            dx_ND[block] = d @ weight_CD
        if want[2]:
            dw_CD.addmm_(d.T, x)
        del d
    return [losses_N, dx_ND, None if dw_CD is None else dw_CD.to(given)]


def forward(args, rows: Callable, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of x and weight that are asked for ahead, empty where not."""
    losses_N, *ahead = walk(args, rows, size, None, (True, *args[6:8]))
    dx, dw = (args[0].new_empty(0) if d is None else d for d in ahead)
    return losses_N, dx, dw


def backward(args, outputs, grads, needs, rows: Callable, size: int) -> list[Tensor]:
    """The gradients made ahead, scaled; made now where they were not, or where scaling cannot serve."""
    dx_ND, dw_CD = outputs
    real_N = args[2] != IGNORE
    g_N = torch.where(real_N, grads[0], 0)
    scale = _common(g_N, grads[0], real_N) if needs[1] and args[7] else None
    again = (False, needs[0] and not args[6], needs[1] and scale is None)
    made = walk(args, rows, size, g_N, again) if any(again) else (None,) * 3
    found = []
    if needs[0]:
        found.append(made[1] if again[1] else (dx_ND * g_N[:, None]).to(dx_ND.dtype))
    if needs[1]:
        found.append(made[2] if again[2] else (dw_CD * scale).to(dw_CD.dtype))
    return found


def _common(g_N: Tensor, given_N: Tensor, real_N: Tensor) -> Tensor | None:
    """The one gradient of all real tokens, or None. That of a sum is known without a look; others are waited for."""
    if not len(g_N):
        return g_N.new_zeros(())
    if given_N.stride() == (0,):
        return given_N[0]
    high = torch.where(real_N, g_N, -torch.inf).amax()
    if not torch.where(real_N, g_N, torch.inf).amin() >= high:
        return None
    return torch.where(real_N.any(), high, 0)
