"""Nonlinear recurrent networks, the definition: a loop over time around a cell (see `cells.py`)."""

import torch
from torch import Tensor

from kernels import segments
from kernels.rnn.cells import CELLS


def reference(
    x_BTGU: Tensor,
    weight: Tensor | None,
    bias_GU: Tensor | None,
    state_BSU: Tensor | None,
    segments_BT: Tensor | None,
    cell: str,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """y (B, T, U) in x's dtype; state (B, S, U), or with keep (B, keep+1, S, U), fp32 (fp64 for fp64).

    weight: (N, G, H, H) for N heads of H units, [n, g, i, j] from unit j to gate g of unit i; or (G, U), each unit to
    itself alone; None where the gates do not read the hidden units. bias_GU is added to what the hidden units give.
    """
    wide = torch.promote_types(x_BTGU.dtype, torch.float32)
    x, weight = x_BTGU.to(wide), None if weight is None else weight.to(wide)
    rows, tokens, gates, units = x.shape
    fresh_S1 = x.new_tensor(CELLS[cell].state)[:, None]
    state = fresh_S1.expand(rows, -1, units) if state_BSU is None else state_BSU.to(wide)
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    outputs, moments = [], []
    for t in range(tokens + 1):
        if t >= tokens - keep:
            moments.append(state)
        if t == tokens:
            break
        before = state if begins_BT is None else torch.where(begins_BT[:, t, None, None], fresh_S1, state)
        h_BU = before[:, 0]
        if weight is None:
            r_BGU = torch.zeros_like(x[:, t])
        elif weight.dim() == 2:
            r_BGU = weight * h_BU[:, None]
        else:
            r_BGU = torch.einsum("ngij,bnj->bgni", weight, h_BU.unflatten(1, (len(weight), -1))).flatten(2)
        if bias_GU is not None:
            r_BGU = r_BGU + bias_GU.to(wide)
        z_BGU = CELLS[cell].merge(x[:, t], r_BGU)
        after = torch.stack(CELLS[cell].step(z_BGU.unbind(1), before.unbind(1)), 1)
        y_BU = after[:, 0]
        if segments_BT is not None:
            real_B1 = segments_BT[:, t, None] >= 0
            after = torch.where(real_B1[..., None], after, state)
            y_BU = torch.where(real_B1, y_BU, 0)
        outputs.append(y_BU.to(x_BTGU.dtype))
        state = after
    y_BTU = torch.stack(outputs, 1) if outputs else x_BTGU[:, :, 0].clone()
    return y_BTU, torch.stack(moments, 1) if keep else moments[0].clone()
