"""Elementwise linear recurrence, the definition: h_t = decay_t * h_{t-1} + x_t."""

import torch
from torch import Tensor

from kernels import segments


def reference(
    x_BTD: Tensor, decay: Tensor, state_BD: Tensor | None, segments_BT: Tensor | None, keep: int
) -> tuple[Tensor, Tensor]:
    """h (B, T, D) in x's dtype; the state (B, D), or with keep (B, keep+1, D), in fp32 or complex64 at least."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    rows, tokens, size = x_BTD.shape
    x, decay_BTD = x_BTD.to(wide), decay.to(wide).expand(rows, tokens, size)
    h = x.new_zeros(rows, size) if state_BD is None else state_BD.to(wide)
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    outputs, moments = [], []
    for t in range(tokens + 1):
        if t >= tokens - keep:
            moments.append(h)
        if t == tokens:
            break
        before = h if segments_BT is None else torch.where(begins_BT[:, t, None], 0, h)
        y = after = decay_BTD[:, t] * before + x[:, t]
        if segments_BT is not None:
            real_B1 = segments_BT[:, t, None] >= 0
            y, after = torch.where(real_B1, after, 0), torch.where(real_B1, after, h)
        outputs.append(y.to(x_BTD.dtype))
        h = after
    return torch.stack(outputs, 1) if outputs else x_BTD.clone(), torch.stack(moments, 1) if keep else h.clone()
