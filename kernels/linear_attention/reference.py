"""Linear attention, the definition: a matrix memory that decays and sums outer products.

S = exp(decay) S + k v^T;  y = scale S^T q
"""

import torch
from torch import Tensor

from kernels import recurrence


def reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """As `recurrence.walk`."""
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    k, v = k_BTHK.to(wide), v_BTHV.to(wide)
    decay = None if decay is None else decay.to(wide)

    def change(t: int, memory: Tensor) -> Tensor:
        kept = memory if decay is None else recurrence.gate(decay, t) * memory
        return kept + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])

    return recurrence.walk(change, q_BTHK, v_BTHV, state_BHKV, segments_BT, scale, keep)
