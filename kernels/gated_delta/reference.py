"""The gated delta rule, the definition (arXiv 2412.06464): forget, then correct what the key recalls.

S = exp(decay) S;  S = S + beta k (v - S^T k)^T;  y = scale S^T q
"""

import torch
from torch import Tensor

from kernels import recurrence


def reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay: Tensor | None,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """As `recurrence.walk`."""
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    k, v, beta = k_BTHK.to(wide), v_BTHV.to(wide), beta_BTH.to(wide)
    decay = None if decay is None else decay.to(wide)

    def change(t: int, memory: Tensor) -> Tensor:
        kept = memory if decay is None else recurrence.gate(decay, t) * memory
        error_BHV = v[:, t] - torch.einsum("bhkv,bhk->bhv", kept, k[:, t])
        return kept + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error_BHV)

    return recurrence.walk(change, q_BTHK, v_BTHV, state_BHKV, segments_BT, scale, keep)
