"""The gated delta rule, the definition (arXiv 2412.06464): forget, then correct what the key recalls.

S = exp(decay) S;  S = S + beta k (v - S^T k)^T;  y = scale S^T q
"""

import torch
from torch import Tensor

from kernels import segments


def reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, V) in v's dtype; state (B, H, K, V), or with keep (B, keep+1, H, K, V), fp32 (fp64 for fp64)."""
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    q, k, v, decay, beta = (x.to(wide) for x in (q_BTHK, k_BTHK, v_BTHV, decay_BTH, beta_BTH))
    rows, tokens, heads, size = q.shape
    state = v.new_zeros(rows, heads, size, v.shape[3]) if state_BHKV is None else state_BHKV.to(wide)
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    outputs, moments = [], []
    for t in range(tokens + 1):
        if t >= tokens - keep:
            moments.append(state)
        if t == tokens:
            break
        fresh = state if begins_BT is None else torch.where(begins_BT[:, t, None, None, None], 0, state)
        after = decay[:, t, :, None, None].exp() * fresh
        error_BHV = v[:, t] - torch.einsum("bhkv,bhk->bhv", after, k[:, t])
        after = after + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error_BHV)
        y_BHV = scale * torch.einsum("bhkv,bhk->bhv", after, q[:, t])
        if segments_BT is not None:
            real_B111 = segments_BT[:, t, None, None, None] >= 0
            after = torch.where(real_B111, after, state)
            y_BHV = torch.where(real_B111[..., 0], y_BHV, 0)
        outputs.append(y_BHV.to(v_BTHV.dtype))
        state = after
    y_BTHV = torch.stack(outputs, 1) if outputs else v_BTHV.clone()
    return y_BTHV, torch.stack(moments, 1) if keep else moments[0].clone()
