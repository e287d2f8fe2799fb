"""The generalised delta rule, the definition: the memory's transition is diagonal plus rank one (DPLR).

    S = diag(exp(decay)) S + b (S^T a)^T + k v^T;  y = scale S^T q

Both terms on the right read S as it was before the token: a asks the memory before it decays.
"""

import torch
from torch import Tensor

from kernels import recurrence


def reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """As `recurrence.walk`."""
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    k, v, decay, a, b = (x.to(wide) for x in (k_BTHK, v_BTHV, decay_BTHK, a_BTHK, b_BTHK))

    def change(t: int, memory: Tensor) -> Tensor:
        asked_BHV = torch.einsum("bhkv,bhk->bhv", memory, a[:, t])
        after = recurrence.gate(decay, t) * memory + torch.einsum("bhk,bhv->bhkv", b[:, t], asked_BHV)
        return after + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])

    return recurrence.walk(change, q_BTHK, v_BTHV, state_BHKV, segments_BT, scale, keep)
