"""Cross-entropy of a linear classifier on a GPU: products by cuBLAS, and one kernel that makes a block's logits into
losses and the gradient of the logits; a sixteenth of the tokens at a time.

A target that is no class makes its loss NaN: to raise, the CPU would have to wait for the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.linear_cross_entropy import blocks
from kernels.linear_cross_entropy.reference import IGNORE

SAVED = 2
SHARE, LEAST = 16, 256  # blocks of a call, so that little memory is held; tokens of one, so that products are large


def forward(
    x_ND: Tensor,
    weight_CD: Tensor,
    targets_N: Tensor,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    x_ahead: bool = False,
    weight_ahead: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked`."""
    args = x_ND, weight_CD, targets_N, softcap, z_loss, smoothing, x_ahead, weight_ahead
    return blocks.forward(args, _rows, _size(x_ND))


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `blocks.backward`."""
    return blocks.backward(args, outputs, grads, needs, _rows, _size(args[0]))


def _size(x_ND: Tensor) -> int:
    return max(LEAST, 128 * triton.cdiv(len(x_ND), 128 * SHARE))


def _rows(logits, target, scale, options, losses, dtype) -> Tensor | None:
    softcap, z_loss, smoothing = options
    tokens, classes = logits.shape
    d = None
    if dtype is not None:  # in place where the type is the same: each thread overwrites what it alone has read
        d = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    block = min(8192, triton.next_power_of_2(classes))
    launch(
        _kernel, (tokens,), logits, target, scale, losses, d, softcap or 1.0, z_loss, smoothing,
        classes, IGNORE, block, softcap != 0, num_warps=16 if block > 2048 else 4,
    )  # fmt: skip
    return d


@triton.jit
def _logit(logits, c, C: tl.constexpr, softcap, CAP: tl.constexpr):
    z = tl.load(logits + c, mask=c < C, other=float("-inf"))
    if CAP:
        z = tl.where(c < C, softcap * (2.0 * tl.sigmoid(2.0 * (z / softcap)) - 1.0), float("-inf"))
    return z


@triton.jit
def _kernel(
    logits, target, scale, losses, d, softcap, z_loss, smoothing,
    C: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    logits += token * C
    y = tl.load(target + token)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)  # of each lane, so that only the end crosses lanes
    mass = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    chosen = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        z = _logit(logits, c, C, softcap, CAP)
        higher = tl.maximum(top, z)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - safe) + tl.exp(z - safe)
        top = higher
        total += tl.where(c < C, z, 0.0)
        chosen += tl.where(c == y, z, 0.0)
    most = tl.max(top, 0)
    norm = most + tl.log(tl.sum(mass * tl.exp(top - most), 0))
    if losses is not None:
        loss = norm - (1.0 - smoothing) * tl.sum(chosen, 0) - smoothing * (tl.sum(total, 0) / C) + z_loss * norm * norm
        loss = tl.where((y >= 0) & (y < C), loss, float("nan"))
        tl.store(losses + token, tl.where(y == IGNORE, 0.0, loss))
    if d is not None:
        g = 1.0
        if scale is not None:
            g = tl.load(scale + token).to(tl.float32)
        g = tl.where(y == IGNORE, 0.0, g)
        d += token * C
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z = _logit(logits, c, C, softcap, CAP)
            slope = tl.exp(z - norm) * (1.0 + 2.0 * z_loss * norm) - smoothing / C
            slope -= tl.where(c == y, 1.0 - smoothing, 0.0)
            if CAP:
                slope *= 1.0 - (z / softcap) * (z / softcap)
            tl.store(d + c, (slope * g).to(d.dtype.element_ty), mask=c < C)
