"""Causal depthwise convolution, the definition: a window of the last W inputs slides over each document."""

import torch
from torch import Tensor

from kernels import segments


def reference(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    segments_BT: Tensor | None,
    silu: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_w weight[:, w] * x[t - (W-1) + w], counted in real tokens of the document, 0 before it."""
    rows, tokens, dim = x_BTD.shape
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    tail = x_BTD.new_zeros(rows, weight_DW.shape[1] - 1, dim) if state_BWD is None else state_BWD.to(x_BTD.dtype)
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    outputs, moments = [], []
    for t in range(tokens + 1):
        if t >= tokens - keep:
            moments.append(tail)
        if t == tokens:
            break
        fresh = tail if segments_BT is None else torch.where(begins_BT[:, t, None, None], 0, tail)
        window_BWD = torch.cat([fresh, x_BTD[:, t : t + 1]], 1)
        y_BD = (window_BWD.to(wide) * weight_DW.T.to(wide)).sum(1)
        if bias_D is not None:
            y_BD = y_BD + bias_D.to(wide)
        y_BD = torch.nn.functional.silu(y_BD) if silu else y_BD
        after = window_BWD[:, 1:]
        if segments_BT is not None:
            real_B1 = segments_BT[:, t, None] >= 0
            y_BD = torch.where(real_B1, y_BD, 0)
            after = torch.where(real_B1[..., None], after, tail)
        outputs.append(y_BD.to(x_BTD.dtype))
        tail = after
    y_BTD = torch.stack(outputs, 1) if outputs else x_BTD.clone()
    return y_BTD, torch.stack(moments, 1) if keep else moments[0].clone()
