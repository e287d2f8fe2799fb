"""The LSTM over a sequence, the definition; gates in torch's order.

i, f, g, o = x_t + W h_{t-1};  c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g);  h_t = sigmoid(o) tanh(c_t)
"""

import torch
from torch import Tensor

from kernels import segments


def reference(
    x_BT4H: Tensor,
    weight_4HH: Tensor,
    hidden_BH: Tensor | None,
    cell_BH: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H) in x's dtype; hidden and cell (B, H), or with keep (B, keep+1, H), fp32 (fp64 for fp64)."""
    wide = torch.promote_types(x_BT4H.dtype, torch.float32)
    x, weight = x_BT4H.to(wide), weight_4HH.to(wide)
    rows, tokens, size = x.shape[0], x.shape[1], weight.shape[1]
    hidden, cell = (x.new_zeros(rows, size) if s is None else s.to(wide) for s in (hidden_BH, cell_BH))
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    outputs, moments = [], []
    for t in range(tokens + 1):
        if t >= tokens - keep:
            moments.append((hidden, cell))
        if t == tokens:
            break
        h, c = hidden, cell
        if segments_BT is not None:
            h, c = (torch.where(begins_BT[:, t, None], 0, s) for s in (hidden, cell))
        i, f, g, o = (x[:, t] + h @ weight.T).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = y_BH = o.sigmoid() * c.tanh()
        if segments_BT is not None:
            real_B1 = segments_BT[:, t, None] >= 0
            h, c = torch.where(real_B1, h, hidden), torch.where(real_B1, c, cell)
            y_BH = torch.where(real_B1, y_BH, 0)
        outputs.append(y_BH.to(x_BT4H.dtype))
        hidden, cell = h, c
    y_BTH = torch.stack(outputs, 1) if outputs else x_BT4H[..., :size].clone()
    hidden, cell = (torch.stack(s, 1) if keep else s[0].clone() for s in zip(*moments, strict=True))
    return y_BTH, hidden, cell
