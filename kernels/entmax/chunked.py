"""Sparse softmax for CPUs: each row's threshold by halving an interval, then Newton's steps; faster than a sort."""

import torch
from torch import Tensor

HALVINGS, STEPS = 6, 50  # before Newton's steps; of those, where a row does not settle


def chunked(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """y as `reference`, and t of each row (..., 1), for `grad`; cannot be recorded by autograd."""
    z = _raised(x, alpha)
    power = 1 / (alpha - 1)
    low = z.new_full((*z.shape[:-1], 1), -1.0)
    for i in range(HALVINGS if power >= 1 else torch.finfo(z.dtype).bits - 4):
        total = _power((z - low).sub_(0.5 ** (i + 1)).relu_(), power).sum(-1, keepdim=True)
        low = torch.where(total >= 1, low + 0.5 ** (i + 1), low)
    # From below Newton's steps never pass the solution if the power is at least 1; else they do not lead there.
    for _ in range(STEPS if power >= 1 and z.numel() else 0):
        over = (z - low).relu_()
        slope = _power(over, power - 1)
        step = ((slope * over).sum(-1, keepdim=True) - 1) / (power * slope.sum(-1, keepdim=True))
        low = low + step
        if not (step > torch.finfo(z.dtype).eps).any():
            break
    return _power(z.sub_(low).relu_(), power).to(x.dtype), low


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """With s_i = y_i^(2 - alpha) where y_i > 0: dx_i = s_i (g_i - sum(s g) / sum(s))."""
    x, alpha = args
    s = _power(_raised(x, alpha).sub_(outputs[0]).relu_(), (2 - alpha) / (alpha - 1))
    sg = s * grads[0]
    mean = sg.sum(-1, keepdim=True) / s.sum(-1, keepdim=True)
    return [sg.sub_(s * mean).to(x.dtype)]


def _raised(x: Tensor, alpha: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide - wide.amax(-1, keepdim=True)).mul_(alpha - 1) if x.numel() else wide.clone()


def _power(over: Tensor, power: float) -> Tensor:
    """over^power for over >= 0, where 0^power = 0."""
    if power == 1:
        return over
    if power == 2:
        return over.square()
    return over.pow(power) if power > 0 else torch.where(over > 0, over.pow(power), 0)
