"""Nonlinear recurrences by Newton's method: h_t = f(h_{t-1}, x_t) for all t of a block of time at once.

Linearised at a guess of every h_{t-1}, the recurrence is a linear one, whose solution is the next guess. Each round
makes at least one more token exact and soon doubles the digits of all: a handful of rounds. Backward has no rounds: at
the solution the gradients obey one linear recurrence, from the last token to the first.
"""

import torch
from torch import Tensor

from kernels import segments
from kernels.newton_scan.cells import CELLS
from kernels.scan import Linear, walk

STATES = 2**18  # numbers in a block's states
STEPS = 8  # calls of so few tokens walk them


class Pairs:
    """h -> A h + x for pairs of numbers: a (2, 2, ...), x and h (2, ...)."""

    @staticmethod
    def apply(a: Tensor, x: Tensor, h: Tensor, out: Tensor) -> None:
        torch.add((a * h).sum(1), x, out=out)

    @staticmethod
    def compose(p: Tensor, a: Tensor) -> None:
        p.copy_((a[:, :, None] * p[None]).sum(1))


def chunked(
    x_BT3D: Tensor,
    weight_ND: Tensor,
    state_BKD: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
    cell: str,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`; then, for `grad`, the states before and after every token, (K, B, T+1, D)."""
    wide = torch.promote_types(x_BT3D.dtype, torch.float32)
    rows, tokens, _, size = x_BT3D.shape
    kind = CELLS[cell]
    real, begins = _marks(segments_BT)
    x, w = _real(x_BT3D.to(wide).movedim(2, 0), real), weight_ND.to(wide)
    line = torch.empty(kind.states, rows, tokens + 1, size, dtype=wide, device=x.device)
    line[:, :, 0] = 0 if state_BKD is None else state_BKD.transpose(0, 1)
    length = 1 if tokens <= STEPS else min(4096, max(64, STATES // max(1, rows * size * kind.states)))
    for first in range(0, tokens, length):
        block = slice(first, min(first + length, tokens))
        marks = None if real is None else (real[:, block], begins[:, block])
        _solve(kind, x[:, :, block], w, line[:, :, first : block.stop + 1], marks, iterations)
    y = _real(line[-1, :, 1:], real)
    moments = line[:, :, tokens - keep :]
    return y.to(x_BT3D.dtype), (moments if keep else moments[:, :, 0]).movedim(0, -2).contiguous(), line


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """g_t = what h_t gets from outside + J_{t+1}^T g_{t+1}; then slopes by the inputs and the weights times g."""
    x_BT3D, weight_ND, state_BKD, segments_BT, keep, cell, _ = args
    line = outputs[0]
    kind, tokens = CELLS[cell], x_BT3D.shape[1]
    real, begins = _marks(segments_BT)
    x, w = _real(x_BT3D.to(line.dtype).movedim(2, 0), real), weight_ND.to(line.dtype)
    before = line[:, :, :-1] if real is None else torch.where(begins, 0, line[:, :, :-1])
    _, jacobian, by_x = kind.slopes(x, w, before)
    g = torch.zeros_like(line)
    g[-1, :, 1:] = _real(grads[0], real)
    dmoments = grads[1].movedim(-2, 0)
    g[:, :, tokens - keep :] += dmoments if keep else dmoments[:, :, None]
    if real is not None:
        jacobian, by_x = _linear(jacobian, real, begins), _real(by_x, real)
    # The gradient of the state before t is J_t^T times that of the one after; g has both ends.
    found = torch.empty_like(line)
    found[:, :, -1] = g[:, :, -1]
    _scan(jacobian.transpose(0, 1), g[:, :, :-1], g[:, :, -1], found[:, :, :-1], reverse=True)
    dx = (by_x * found[:, :, 1:]).sum(1)
    dw = [(dx[i] * factor).sum((0, 1)) for factor, i in kind.weight_slopes(x, w, before, by_x)]
    made = dx.movedim(0, 2), torch.stack(dw), found[:, :, 0].transpose(0, 1)
    return [v.to(arg.dtype) for v, arg, need in zip(made, args, needs, strict=False) if need]


def _solve(kind, x: Tensor, w: Tensor, line: Tensor, marks, iterations: int) -> None:
    """The states after each token of a block into line[:, :, 1:], from the one in line[:, :, 0].

    A round solves for the change, so what it rounds is what the recurrence is still off by, not the states.
    """
    start, before, after, tokens = line[:, :, 0], line[:, :, :-1], line[:, :, 1:], x.shape[2]
    bound = start.abs().amax().clamp(min=1).item() if start.numel() else 1.0  # no state is larger
    close = 0.1 * torch.finfo(x.dtype).eps ** 0.5  # one more round about squares it
    alone = kind.step(x, w, torch.zeros_like(before))
    after.copy_(alone)
    real, begins = (None, None) if marks is None else marks
    change, nothing, last = torch.empty_like(alone), torch.zeros_like(start), False
    for _ in range(min(iterations, tokens) if iterations else tokens):
        value, jacobian, _ = kind.slopes(x, w, before)
        if marks is not None:
            value = torch.where(real, torch.where(begins, alone, value), before)
            jacobian = _linear(jacobian, real, begins)
        _scan(jacobian, value.sub_(after), nothing, change)
        after.add_(change)
        if tokens == 1 or last:
            break
        after.nan_to_num_(0).clamp_(-bound, bound)  # tokens far from solved may be anywhere
        last = change.abs().amax().item() <= close if change.numel() else True
    if marks is not None:  # padding changes no bit
        place_BT1 = torch.arange(1, tokens + 1, device=x.device)[:, None].where(real, 0).cummax(1).values
        after.copy_(line.gather(2, place_BT1.expand_as(after)))


def _linear(jacobian: Tensor, real: Tensor, begins: Tensor) -> Tensor:
    """0 where a document begins; at padding the state stays."""
    same = torch.eye(jacobian.shape[0], dtype=jacobian.dtype, device=jacobian.device)[..., None, None, None]
    return torch.where(real, jacobian, same).masked_fill(begins, 0)


def _real(v: Tensor, real_BT1: Tensor | None) -> Tensor:
    """v (..., B, T, D) with 0 at padding, where NaN may have been."""
    return v if real_BT1 is None else torch.where(real_BT1, v, 0)


def _scan(a: Tensor, x: Tensor, start: Tensor, out: Tensor, reverse: bool = False) -> None:
    if a.shape[0] == 1:
        walk(Linear, a[0, 0], x[0], start[0], out[0], reverse)
    else:
        walk(Pairs, a, x, start, out, reverse)


def _marks(segments_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if segments_BT is None:
        return None, None
    return (segments_BT >= 0)[..., None], segments.begins(segments.filled(segments_BT))[..., None]
