"""ParaRNN's recurrences, the definition: one step of the cell after the other."""

import torch
from torch import Tensor

from kernels import segments
from kernels.newton_scan.cells import CELLS


def reference(
    x_BT3D: Tensor,
    weight_ND: Tensor,
    state_BKD: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
    cell: str,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """h (B, T, D) in x's dtype; the state (B, K, D), or with keep (B, keep+1, K, D), in fp32 at least."""
    wide = torch.promote_types(x_BT3D.dtype, torch.float32)
    rows, tokens, _, size = x_BT3D.shape
    x, w = x_BT3D.to(wide).movedim(2, 0), weight_ND.to(wide)
    kind = CELLS[cell]
    s = x.new_zeros(kind.states, rows, size) if state_BKD is None else state_BKD.to(wide).transpose(0, 1)
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    outputs, moments = [], []
    for t in range(tokens + 1):
        if t >= tokens - keep:
            moments.append(s)
        if t == tokens:
            break
        before = s if segments_BT is None else torch.where(begins_BT[:, t, None], 0, s)
        after = kind.step(x[:, :, t], w, before)
        y = after[-1]
        if segments_BT is not None:
            real_B1 = segments_BT[:, t, None] >= 0
            y, after = torch.where(real_B1, y, 0), torch.where(real_B1, after, s)
        outputs.append(y.to(x_BT3D.dtype))
        s = after
    y = torch.stack(outputs, 1) if outputs else x_BT3D.new_empty(rows, 0, size)
    state = torch.stack(moments, 2) if keep else moments[0]  # (K, B, ..., D)
    return y, state.movedim(0, -2).clone()
