"""Mamba's selective scan, the definition: h_t = exp(step_t A) h_{t-1} + step_t x_t B_t;  y_t = C_t . h_t + D x_t."""

import torch
from torch import Tensor

from kernels import segments


def reference(
    x_BTD: Tensor,
    step_BTD: Tensor,
    a_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    d_D: Tensor | None,
    state_BDN: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
    scan: str,
) -> tuple[Tensor, Tensor]:
    """y (B, T, D) in x's dtype; the state (B, D, N), or with keep (B, keep+1, D, N), in fp32 at least."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    x, step, a, b, c = (v.to(wide) for v in (x_BTD, step_BTD, a_DN, b_BTN, c_BTN))
    h = x.new_zeros(x.shape[0], *a.shape) if state_BDN is None else state_BDN.to(wide)
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    outputs, moments = [], []
    for t in range(x.shape[1] + 1):
        if t >= x.shape[1] - keep:
            moments.append(h)
        if t == x.shape[1]:
            break
        before = h if segments_BT is None else torch.where(begins_BT[:, t, None, None], 0, h)
        after = (step[:, t, :, None] * a).exp() * before + (step[:, t] * x[:, t])[..., None] * b[:, t, None]
        y = (after @ c[:, t, :, None])[..., 0]
        y = y if d_D is None else y + d_D.to(wide) * x[:, t]
        if segments_BT is not None:
            real_B1 = segments_BT[:, t, None] >= 0
            y, after = torch.where(real_B1, y, 0), torch.where(real_B1[..., None], after, h)
        outputs.append(y.to(x_BTD.dtype))
        h = after
    y = torch.stack(outputs, 1) if outputs else x_BTD.clone()
    return y, torch.stack(moments, 1) if keep else moments[0].clone()
