"""The elementwise linear recurrence for CPUs: `kernels.scan`, with documents and padding written into the decays."""

import torch
from torch import Tensor

from kernels import segments
from kernels.scan import scan


def chunked(
    x_BTD: Tensor, decay: Tensor, state_BD: Tensor | None, segments_BT: Tensor | None, keep: int
) -> tuple[Tensor, Tensor]:
    """As `reference`."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    rows, tokens, size = x_BTD.shape
    start = x_BTD.new_zeros(rows, size, dtype=wide) if state_BD is None else state_BD.to(wide)
    if tokens == 0:
        return x_BTD, start[:, None] if keep else start
    x, decay_BTD = x_BTD.to(wide), decay.to(wide).expand(rows, tokens, size)
    if segments_BT is not None:
        decay_BTD, x = marked(segments_BT, decay_BTD, x)
    h = scan(decay_BTD, x, start)
    y = h if segments_BT is None else torch.where((segments_BT >= 0)[..., None], h, 0)
    if not keep:
        return y.to(x_BTD.dtype), h[:, -1]
    moments = h[:, max(tokens - keep - 1, 0) :]
    return y.to(x_BTD.dtype), torch.cat([start[:, None], moments], 1) if keep == tokens else moments


def marked(segments_BT: Tensor, decay_BTD: Tensor, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """decay and x that keep documents apart: a decay of 0 where one begins; of 1, and nothing added, at padding."""
    begins_BT1 = segments.begins(segments.filled(segments_BT))[..., None]
    real_BT1 = (segments_BT >= 0)[..., None]
    decay_BTD = torch.where(real_BT1, decay_BTD, 1).masked_fill(begins_BT1, 0)
    return decay_BTD, torch.where(real_BT1, x_BTD, 0)
