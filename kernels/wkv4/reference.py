"""WKV of RWKV-4, the definition: two decaying sums, held over e^m so that no exponential overflows.

With the sums a and b over e^m:
    q = max(m, u + k);  y = (e^{m-q} a + e^{u+k-q} v) / (e^{m-q} b + e^{u+k-q})
    m' = max(m + w, k);  a = e^{m+w-m'} a + e^{k-m'} v;  b = e^{m+w-m'} b + e^{k-m'}
"""

import torch
from torch import Tensor

from kernels import segments

FRESH = -1e30  # m where no token has been


def reference(
    k_BTD: Tensor,
    v_BTD: Tensor,
    decay_D: Tensor,
    bonus_D: Tensor,
    state_B3D: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """y (B, T, D) in v's dtype; the state (B, 3, D), or with keep (B, keep+1, 3, D), fp32 (fp64 for fp64)."""
    wide = torch.promote_types(v_BTD.dtype, torch.float32)
    k, v, decay, bonus = (x.to(wide) for x in (k_BTD, v_BTD, decay_D, bonus_D))
    rows, tokens, size = k.shape
    fresh_31 = k.new_tensor([0.0, 0.0, FRESH])[:, None]
    state = fresh_31.expand(rows, 3, size) if state_B3D is None else state_B3D.to(wide)
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    outputs, moments = [], []
    for t in range(tokens + 1):
        if t >= tokens - keep:
            moments.append(state)
        if t == tokens:
            break
        before = state if begins_BT is None else torch.where(begins_BT[:, t, None, None], fresh_31, state)
        a, b, m = before.unbind(1)
        y, after = step(a, b, m, k[:, t], v[:, t], decay, bonus)
        if segments_BT is not None:
            real_B1 = segments_BT[:, t, None] >= 0
            y, after = torch.where(real_B1, y, 0), torch.where(real_B1[..., None], after, state)
        outputs.append(y.to(v_BTD.dtype))
        state = after
    y_BTD = torch.stack(outputs, 1) if outputs else v_BTD.clone()
    return y_BTD, torch.stack(moments, 1) if keep else moments[0].clone()


def step(a, b, m, k, v, decay, bonus) -> tuple[Tensor, Tensor]:
    """y and the state after one token, (B, D) and (B, 3, D)."""
    most = torch.maximum(m, bonus + k)
    past, now = (m - most).exp(), (bonus + k - most).exp()
    y = (past * a + now * v) / (past * b + now)
    after = torch.maximum(m + decay, k)
    past, now = (m + decay - after).exp(), (k - after).exp()
    return y, torch.stack([past * a + now * v, past * b + now, after], 1)
