"""Causal depthwise convolution for CPUs: W shifted products of whole sequences.

Packing costs a mask per tap. Padding is taken out first (real tokens move to the front of their row) and put back
after, so that the taps of a token are always the columns just before it. Time goes by blocks that a cache holds.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.conv1d.tail import give, order, places, take

NUMBERS = 2**16  # of a block


def chunked(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    segments_BT: Tensor | None,
    silu: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """x (B, T, D) -> y (B, T, D), state (B, W-1, D) or with keep (B, keep+1, W-1, D); as `reference`."""
    rows, tokens, _ = x_BTD.shape
    tail, x, number, moved = _line(x_BTD, weight_DW, state_BWD, segments_BT)
    made = []
    for block in _blocks(x_BTD):
        y = _taps(*_window(tail, x, number, block), weight_DW, bias_D)
        made.append((torch.nn.functional.silu(y) if silu else y).to(x_BTD.dtype))
    y_BTD = torch.cat(made, 1) if len(made) > 1 else made[0]
    if moved is not None:
        y_BTD = torch.where((segments_BT >= 0)[..., None], _back(y_BTD, moved), 0)
    state = take(x_BTD, state_BWD, *places(segments_BT, rows, tokens, keep, weight_DW.shape[1] - 1, x_BTD.device))
    return y_BTD, state if keep else state[:, 0]


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """The same shifts the other way."""
    x_BTD, weight_DW, bias_D, state_BWD, segments_BT, silu, keep = args
    rows, tokens, dim = x_BTD.shape
    taps = weight_DW.shape[1]
    tail, x, number, moved = _line(x_BTD, weight_DW, state_BWD, segments_BT)
    wide = torch.promote_types(x.dtype, torch.float32)
    dy = grads[0]
    if moved is not None:
        dy = torch.where((segments_BT >= 0)[..., None], dy, 0).gather(1, moved[..., None].expand_as(dy))
    weight = weight_DW.to(wide).unbind(1)
    dline = x.new_zeros(rows, taps - 1 + tokens, dim, dtype=wide)
    dweight, dbias = dline.new_zeros(taps, dim), dline.new_zeros(dim)
    for block in _blocks(x_BTD):
        line, of = _window(tail, x, number, block)
        line, g = line.to(wide), dy[:, block].to(wide)
        length = g.shape[1]
        if silu:
            y = _taps(line, of, weight_DW, bias_D)
            gate = y.sigmoid()
            g = g * gate * (1 + y * (1 - gate))
        for w in range(taps):
            g_tap = g
            if of is not None and w < taps - 1:
                g_tap = torch.where((of[:, w : w + length] == of[:, taps - 1 :])[..., None], g, 0)
            dline[:, block.start + w : block.stop + w].addcmul_(g_tap, weight[w])
            dweight[w] += (g_tap * line[:, w : w + length]).sum((0, 1))
        dbias += g.sum((0, 1))
    dx, dstate = dline[:, taps - 1 :], dline[:, : taps - 1].contiguous()
    dx = dx.contiguous() if moved is None else _back(dx, moved)
    give(grads[1], *places(segments_BT, rows, tokens, keep, taps - 1, x_BTD.device), dx, dstate)
    found = (dx, dweight.T, dbias, dstate)
    return [v.to(arg.dtype) for v, arg, need in zip(found, args, needs, strict=False) if need]


def _blocks(x_BTD: Tensor) -> Iterator[slice]:
    """Stretches of time; one at least."""
    rows, tokens, dim = x_BTD.shape
    size = max(64, NUMBERS // max(1, rows * dim))
    for first in range(0, max(tokens, 1), size):
        yield slice(first, min(first + size, tokens))


def _line(x_BTD, weight_DW, state_BWD, segments_BT) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What came before, and the real tokens; the documents of both; and which columns they are, where they moved."""
    rows, _, dim = x_BTD.shape
    reach = weight_DW.shape[1] - 1
    moved = None
    if segments_BT is not None and bool((segments_BT < 0).any()):
        moved = order(segments_BT)
        x_BTD = torch.where((segments_BT >= 0)[..., None], x_BTD, 0)  # NaN it may be
        segments_BT = segments_BT.gather(1, moved)
        x_BTD = x_BTD.gather(1, moved[..., None].expand_as(x_BTD))
    tail = x_BTD.new_zeros(rows, reach, dim) if state_BWD is None else state_BWD.to(x_BTD.dtype)
    number = None if segments_BT is None else torch.cat([segments_BT.new_zeros(rows, reach), segments_BT], 1)
    return tail, x_BTD, number, moved


def _window(tail: Tensor, x: Tensor, number: Tensor | None, block: slice) -> tuple[Tensor, Tensor | None]:
    """The inputs of a block of outputs and those their taps reach, and their documents."""
    reach = tail.shape[1]
    line = x[:, max(block.start - reach, 0) : block.stop]
    if block.start < reach:
        line = torch.cat([tail[:, block.start :], line], 1)
    return line, None if number is None else number[:, block.start : block.stop + reach]


def _back(x_BTD: Tensor, moved_BT: Tensor) -> Tensor:
    """Every token in its own column again."""
    return x_BTD.gather(1, moved_BT.argsort(1)[..., None].expand_as(x_BTD))


def _taps(line: Tensor, number: Tensor | None, weight_DW: Tensor, bias_D: Tensor | None) -> Tensor:
    wide = torch.promote_types(line.dtype, torch.float32)
    taps = weight_DW.shape[1]
    tokens = line.shape[1] - taps + 1
    weight = weight_DW.to(wide).unbind(1)
    line = line.to(wide)
    y = line[:, taps - 1 :] * weight[taps - 1]
    y = y if bias_D is None else y + bias_D.to(wide)
    for w in range(taps - 1):
        x = line[:, w : w + tokens]
        if number is not None:
            x = torch.where((number[:, w : w + tokens] == number[:, taps - 1 :])[..., None], x, 0)
        y = torch.addcmul(y, x, weight[w])
    return y
