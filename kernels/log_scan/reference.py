"""The elementwise linear recurrence on logarithms and signs, the definition.

h is carried as u e^m: m is as large as the largest term, u holds the sign. Gradients are those of the values h, written
for their logarithms, so they go through an h of 0 to what was before it.
"""

import torch
from torch import Tensor

from kernels import segments


def reference(
    log_a_BTD: Tensor,
    log_b_BTD: Tensor,
    sign_a_BTD: Tensor | None,
    sign_b_BTD: Tensor | None,
    log_state_BD: Tensor | None,
    sign_state_BD: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log|h| in log_a's dtype and its sign, (B, T, D); those of the state, (B, D) or (B, keep+1, D), fp32 at least."""
    wide = torch.promote_types(log_a_BTD.dtype, torch.float32)
    rows, tokens, size = log_a_BTD.shape
    log_a, log_b = log_a_BTD.to(wide), log_b_BTD.to(wide)
    start = log_a.new_full((rows, size), -torch.inf) if log_state_BD is None else log_state_BD.to(wide)
    m = finite(start.detach())
    u = (start - m).exp()
    u = u if sign_state_BD is None else u * sign_state_BD
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    logs, signs, moments = [], [], []
    for t in range(tokens + 1):
        if t >= tokens - keep:
            moments.append(logarithm(u, m))
        if t == tokens:
            break
        old, old_m = u, m
        if segments_BT is not None:
            u = torch.where(begins_BT[:, t, None], 0, u)
        decayed = log_a[:, t] + m
        m = finite(torch.maximum(decayed + u.abs().log(), log_b[:, t]).detach())
        # The bound is reached only where u is 0 and keeps the gradient finite there.
        u = u * (decayed - m).clamp(max=80).exp() * (1 if sign_a_BTD is None else sign_a_BTD[:, t])
        u = u + (log_b[:, t] - m).exp() * (1 if sign_b_BTD is None else sign_b_BTD[:, t])
        log_h, sign = logarithm(u, m)
        if segments_BT is not None:
            real_B1 = segments_BT[:, t, None] >= 0
            u, m = torch.where(real_B1, u, old), torch.where(real_B1, m, old_m)
            log_h, sign = torch.where(real_B1, log_h, -torch.inf), torch.where(real_B1, sign, 0)
        logs.append(log_h.to(log_a_BTD.dtype))
        signs.append(sign)
    y = torch.stack(logs, 1) if logs else log_a_BTD.clone()
    sign_h = torch.stack(signs, 1) if signs else y.to(torch.int8)
    return y, sign_h, *(torch.stack(x, 1) if keep else x[0].clone() for x in zip(*moments, strict=True))


def finite(m: Tensor) -> Tensor:
    """A scale for every value: 1 where the value is 0."""
    return torch.where(m == -torch.inf, 0, m)


def logarithm(u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """log|u e^m| and the sign, int8; of 0 they are -inf, without a gradient, and 0."""
    zero = u == 0
    return torch.where(zero, -torch.inf, torch.where(zero, 1, u.abs()).log() + m), u.sign().to(torch.int8)
