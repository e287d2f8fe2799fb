"""Linear attention, the definition: a matrix memory that decays and sums outer products.

S = exp(decay) S + k v^T;  y = scale S^T q
"""

import torch
from torch import Tensor

from kernels import segments


def reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTH: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, V) in v's dtype; state (B, H, K, V), or with keep (B, keep+1, H, K, V), fp32 (fp64 for fp64)."""
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_BTHK, k_BTHK, v_BTHV))
    rows, tokens, heads, size = q.shape
    state = v.new_zeros(rows, heads, size, v.shape[3]) if state_BHKV is None else state_BHKV.to(wide)
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    outputs, moments = [], []
    for t in range(tokens + 1):
        if t >= tokens - keep:
            moments.append(state)
        if t == tokens:
            break
        after = state if begins_BT is None else torch.where(begins_BT[:, t, None, None, None], 0, state)
        if decay_BTH is not None:
            after = decay_BTH[:, t, :, None, None].to(wide).exp() * after
        after = after + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        y_BHV = scale * torch.einsum("bhkv,bhk->bhv", after, q[:, t])
        if segments_BT is not None:
            real_B111 = segments_BT[:, t, None, None, None] >= 0
            after = torch.where(real_B111, after, state)
            y_BHV = torch.where(real_B111[..., 0], y_BHV, 0)
        outputs.append(y_BHV.to(v_BTHV.dtype))
        state = after
    y_BTHV = torch.stack(outputs, 1) if outputs else v_BTHV.clone()
    return y_BTHV, torch.stack(moments, 1) if keep else moments[0].clone()
