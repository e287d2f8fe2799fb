"""Recurrences h_t = f_t(h_{t-1}) by chunks of time: what the chunked forms of scans share.

All chunks walk side by side, so a step in Python is one operation on a column of every chunk: first from nothing, for
the map that each whole chunk is; then, once the chunks' own recurrence has given where each begins, for the values.
Work and memory are linear in T, and there is no division and no logarithm, so any decay is as good as any other.

Time is the last dimension but one. `maps` has the two operations that a family of maps (a, x) needs:
apply(a, x, h, out): the map's value at h, into `out`, which may be h; compose(p, a): p becomes a after p, in place.
"""

import torch
from torch import Tensor

STEPS = 16  # so few tokens are walked one by one


class Linear:
    """h -> a h + x, elementwise."""

    @staticmethod
    def apply(a: Tensor, x: Tensor, h: Tensor, out: Tensor) -> None:
        torch.addcmul(x, a, h, out=out)

    @staticmethod
    def compose(p: Tensor, a: Tensor) -> None:
        p.mul_(a)


class MaxPlus:
    """h -> max(a + h, x), elementwise."""

    @staticmethod
    def apply(a: Tensor, x: Tensor, h: Tensor, out: Tensor) -> None:
        torch.add(a, h, out=out)
        torch.maximum(out, x, out=out)

    @staticmethod
    def compose(p: Tensor, a: Tensor) -> None:
        p.add_(a)


def walk(maps: type, a: Tensor, x: Tensor, start: Tensor, out: Tensor, reverse: bool = False) -> Tensor:
    """Every h_t into out (..., T, D), from start (..., D) before the first, or after the last if reverse; no gradients.

    a and x are of out's shape, or of more dimensions in front where the family's maps are matrices.
    """
    tokens = x.shape[-2]
    if tokens <= STEPS:
        h = start
        for t in range(tokens - 1, -1, -1) if reverse else range(tokens):
            maps.apply(a[..., t, :], x[..., t, :], h, out[..., t, :])
            h = out[..., t, :]
        return out
    size = max(8, int((tokens / 4) ** 0.5))
    count = tokens // size
    whole = count * size
    first, rest = slice(0, whole), slice(whole, tokens)
    if reverse:
        first, rest = slice(tokens - whole, tokens), slice(0, tokens - whole)
    # (..., count, size, D); a column c is (..., count, D)
    chunks_a, chunks_x, chunks_h = (v[..., first, :].unflatten(-2, (count, size)) for v in (a, x, out))
    columns = range(size - 1, -1, -1) if reverse else range(size)
    p, h = chunks_a[..., columns[0], :].clone(), chunks_x[..., columns[0], :].clone()
    for c in columns[1:]:
        maps.apply(chunks_a[..., c, :], chunks_x[..., c, :], h, h)
        maps.compose(p, chunks_a[..., c, :])
    ends = walk(maps, p, h, start, torch.empty_like(h), reverse)
    edge = start.unsqueeze(-2)
    h = torch.cat([ends[..., 1:, :], edge] if reverse else [edge, ends[..., :-1, :]], -2)
    for c in columns:
        maps.apply(chunks_a[..., c, :], chunks_x[..., c, :], h, chunks_h[..., c, :])
        h = chunks_h[..., c, :]
    if whole < tokens:
        last = ends[..., 0, :] if reverse else ends[..., -1, :]
        walk(maps, a[..., rest, :], x[..., rest, :], last, out[..., rest, :], reverse)
    return out


class _Scan(torch.autograd.Function):
    """The linear scan. Its gradient is made of scans, so it can be differentiated any number of times."""

    @staticmethod
    def forward(ctx, a, x, start, reverse):
        h = walk(Linear, a, x, start, torch.empty_like(x, memory_format=torch.contiguous_format), reverse)
        ctx.save_for_backward(a, start, h)
        ctx.reverse = reverse
        return h

    @staticmethod
    def backward(ctx, dh):
        a, start, h = ctx.saved_tensors
        edge = start.unsqueeze(-2)
        a = a.conj().resolve_conj() if a.is_complex() else a
        if ctx.reverse:
            later, before = torch.cat([torch.zeros_like(a[..., :1, :]), a[..., :-1, :]], -2), [h[..., 1:, :], edge]
            first = -1
        else:
            later, before = torch.cat([a[..., 1:, :], torch.zeros_like(a[..., :1, :])], -2), [edge, h[..., :-1, :]]
            first = 0
        dx = scan(later, dh, torch.zeros_like(start), not ctx.reverse)
        da = dx * torch.cat(before, -2).conj() if ctx.needs_input_grad[0] else None
        dstart = a[..., first, :] * dx[..., first, :] if ctx.needs_input_grad[2] else None
        return da, dx, dstart, None


def scan(a: Tensor, x: Tensor, start: Tensor, reverse: bool = False) -> Tensor:
    """h_t = a_t h_{t-1} + x_t (h_{t+1} if reverse) over the last dimension but one; differentiable.

    a, x (..., T, D) of one dtype, T at least 1; start (..., D).
    """
    return _Scan.apply(a, x, start, reverse)
