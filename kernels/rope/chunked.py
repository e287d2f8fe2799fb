"""Rotary position embedding for CPUs: written in place, without a copy of either half."""

import torch
from torch import Tensor

from kernels import cpu


def chunked(x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
    """As `reference`; cannot be recorded by autograd."""
    if cpu.serves(x_BTHK):
        return torch.ops.edifice_cpu.rope(x_BTHK, cos_BTR, sin_BTR, interleaved)
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    pairs = cos_BTR.shape[-1]
    y = torch.empty(x_BTHK.shape, dtype=wide, device=x_BTHK.device)
    x = x_BTHK.to(wide)
    cos, sin = cos_BTR.to(wide).unsqueeze(2), sin_BTR.to(wide).unsqueeze(2)
    (x1, x2), (y1, y2) = _pair(x, pairs, interleaved), _pair(y, pairs, interleaved)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    if 2 * pairs < x.shape[-1]:
        y[..., 2 * pairs :] = x[..., 2 * pairs :]
    return y.to(x_BTHK.dtype)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """x turned back, and with (a, b) a pair of x and (g, h) its gradient: dcos = ga + hb, dsin = ha - gb."""
    x_BTHK, cos_BTR, sin_BTR, interleaved = args
    found = []
    if needs[0]:
        found.append(chunked(grads[0], cos_BTR, -sin_BTR, interleaved))
    if needs[1] or needs[2]:
        wide = torch.promote_types(x_BTHK.dtype, torch.float32)
        (a, b), (g, h) = (_pair(v.to(wide), cos_BTR.shape[-1], interleaved) for v in (x_BTHK, grads[0]))
        if needs[1]:
            found.append(folded(g.mul(a).addcmul_(h, b).sum(2), cos_BTR))
        if needs[2]:
            found.append(folded(h.mul(a).addcmul_(g, b, value=-1).sum(2), sin_BTR))
    return found


def folded(d_BTR: Tensor, given: Tensor) -> Tensor:
    """The gradient of what was `given` once for all rows, or once for each."""
    return (d_BTR if len(given) == len(d_BTR) else d_BTR.sum(0, keepdim=True)).to(given.dtype)


def _pair(x: Tensor, pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    return x.narrow(-1, 0, pairs), x.narrow(-1, pairs, pairs)
