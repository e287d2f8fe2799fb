"""RMS normalisation for CPUs: a few whole-tensor passes, and a gradient that needs nothing but the inputs."""

import torch
from torch import Tensor


def chunked(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (..., D), weight (D) or None; as `reference`."""
    wide, scale = _scale(x, eps)
    y = wide * scale
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """With n = x * scale and h = g * weight: dx = scale * (h - n * mean(h * n)), dweight = sum(g * n)."""
    x, weight, eps = args
    wide, scale = _scale(x, eps)
    g, n = grads[0].to(wide.dtype), wide * scale
    found = []
    if needs[0]:
        h = g if weight is None else g * weight.to(g.dtype)
        mean = (h * n).mean(-1, keepdim=True)
        found.append(((h - n * mean) * scale).to(x.dtype))
    if needs[1]:
        found.append((g * n).flatten(0, -2).sum(0).to(weight.dtype) if x.dim() > 1 else (g * n).to(weight.dtype))
    return found


def _scale(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide, (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
