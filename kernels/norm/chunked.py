"""Normalisation for CPUs: a few whole-tensor passes, and a gradient that needs nothing but the inputs."""

import torch
from torch import Tensor

from kernels import cpu


def chunked(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, center: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference`."""
    stream = x if residual is None else x + residual
    if not center and cpu.serves(x, weight):
        y = torch.ops.edifice_cpu.rms_norm(stream, weight, eps)
        return y, x.new_empty(0) if residual is None else stream
    if _native(x, weight, bias, center):
        y = torch.native_layer_norm(stream, x.shape[-1:], weight, bias, eps)[0]
        return y, x.new_empty(0) if residual is None else stream
    y, scale = _normal(stream, center, eps)
    y = y * scale
    y = y if weight is None else y * weight.to(y.dtype)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype), x.new_empty(0) if residual is None else stream


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """With n = (x - mean) * scale and h = g * weight: dx = scale * (h - mean(h) - n * mean(h * n)).

    mean(h) is there only where the mean was taken out; dweight = sum(g * n), dbias = sum(g).
    """
    x, weight, bias, residual, center, eps = args
    if _native(x, weight, bias, center):
        return _native_grad(args, grads, needs)
    wide, scale = _normal(x if residual is None else x + residual, center, eps)
    g, n = grads[0].to(wide.dtype), wide * scale
    found = []
    if needs[0] or needs[3]:
        h = g if weight is None else g * weight.to(g.dtype)
        dx = (h - n * (h * n).mean(-1, keepdim=True)) * scale
        if center:
            dx = dx - (h * scale).mean(-1, keepdim=True)
        if residual is not None:
            dx = dx + grads[1].to(dx.dtype)
        dx = dx.to(x.dtype)
    if needs[0]:
        found.append(dx)
    if needs[1]:
        found.append((g * n).flatten(0, -2).sum(0).to(weight.dtype) if x.dim() > 1 else (g * n).to(weight.dtype))
    if needs[2]:
        found.append(g.flatten(0, -2).sum(0).to(bias.dtype) if x.dim() > 1 else g.to(bias.dtype))
    if needs[3]:
        found.append(dx)
    return found


def _native(x: Tensor, weight: Tensor | None, bias: Tensor | None, center: bool) -> bool:
    """Whether torch's layer norm, one pass, serves: where types are mixed or narrow it rounds the statistics."""
    same = all(p is None or p.dtype == x.dtype for p in (weight, bias))
    return center and same and x.dtype in (torch.float32, torch.float64) and x.shape[-1] > 0


def _native_grad(args, grads, needs) -> list[Tensor]:
    x, weight, bias, residual, _, eps = args
    stream, g = (x if residual is None else x + residual).contiguous(), grads[0].contiguous()
    n, mean, scale = torch.native_layer_norm(stream, x.shape[-1:], None, None, eps)
    dx = dweight = dbias = None
    if needs[0] or needs[3]:
        only = [True, False, False]  # torch adds up the rest row after row, which rounds more than sum does
        dx = torch.ops.aten.native_layer_norm_backward(g, stream, x.shape[-1:], mean, scale, weight, bias, only)[0]
        dx = dx if residual is None else dx.add_(grads[1])
    if needs[1]:
        dweight = (g * n).view(-1, x.shape[-1]).sum(0)
    if needs[2]:
        dbias = g.view(-1, x.shape[-1]).sum(0)
    return [found for found, need in zip((dx, dweight, dbias, dx), needs, strict=False) if need]


def _normal(x: Tensor, center: bool, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    return wide, (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
