"""The recurrence on logarithms for CPUs: first the scale of every h, then the linear recurrence at those scales.

m_t = max(log a_t + m_{t-1}, log b_t), the largest term of h_t, is a recurrence of the same kind, with max for the sum.
With u_t = h_t e^(-m_t),

    u_t = sign a_t e^(log a_t + m_{t-1} - m_t) u_{t-1} + sign b_t e^(log b_t - m_t)

where no factor is above 1. The scales are no function of the inputs to autograd, as any would do.
"""

import torch
from torch import Tensor

from kernels import segments
from kernels.log_scan.reference import finite, logarithm
from kernels.scan import MaxPlus, scan, walk


def chunked(
    log_a_BTD: Tensor,
    log_b_BTD: Tensor,
    sign_a_BTD: Tensor | None,
    sign_b_BTD: Tensor | None,
    log_state_BD: Tensor | None,
    sign_state_BD: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference`."""
    wide = torch.promote_types(log_a_BTD.dtype, torch.float32)
    rows, tokens, size = log_a_BTD.shape
    log_a, log_b = log_a_BTD.to(wide), log_b_BTD.to(wide)
    start = log_a.new_full((rows, size), -torch.inf) if log_state_BD is None else log_state_BD.to(wide)
    if segments_BT is not None:
        real_BT1 = (segments_BT >= 0)[..., None]
        begins_BT1 = segments.begins(segments.filled(segments_BT))[..., None]
        log_a = torch.where(real_BT1, log_a, 0).masked_fill(begins_BT1, -torch.inf)
        log_b = torch.where(real_BT1, log_b, -torch.inf)
        sign_a_BTD = None if sign_a_BTD is None else torch.where(real_BT1, sign_a_BTD, 1)
    with torch.no_grad():
        m = torch.empty_like(log_a, memory_format=torch.contiguous_format)
        m = finite(torch.cat([start[:, None], walk(MaxPlus, log_a.detach(), log_b.detach(), start, m)], 1))
    u = (start - m[:, 0]).exp()
    u = u if sign_state_BD is None else u * sign_state_BD
    line = u[:, None]
    if tokens:
        # The difference of the scales first: it takes back what rounding did to them. The bound is for an h of 0.
        a = (log_a - (m[:, 1:] - m[:, :-1])).clamp(max=1).exp()
        b = (log_b - m[:, 1:]).exp()
        a = a if sign_a_BTD is None else a * sign_a_BTD
        b = b if sign_b_BTD is None else b * sign_b_BTD
        h = scan(a, b, u)
        y, sign = logarithm(h, m[:, 1:])
        line = torch.cat([line, h[:, -keep - 1 :]], 1)
    else:
        y, sign = log_a, log_a.to(torch.int8)
    if segments_BT is not None:
        y, sign = torch.where(real_BT1, y, -torch.inf), torch.where(real_BT1, sign, 0)
    state, sign_state = logarithm(line[:, -keep - 1 :], m[:, -keep - 1 :])
    state, sign_state = (state, sign_state) if keep else (state[:, 0], sign_state[:, 0])
    return y.to(log_a_BTD.dtype), sign, state, sign_state
