"""Cross-entropy of a linear classifier for CPUs: the rows of a block in torch. bf16 inputs are widened."""

import torch
from torch import Tensor

from kernels.linear_cross_entropy import blocks
from kernels.linear_cross_entropy.reference import IGNORE

BLOCK = 1 << 22  # logits held at a time


def chunked(
    x_ND: Tensor,
    weight_CD: Tensor,
    targets_N: Tensor,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    x_ahead: bool = False,
    weight_ahead: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N) as `reference`, and the gradients of their sum for x and weight, each empty where not asked for."""
    args = x_ND, weight_CD, targets_N, softcap, z_loss, smoothing, x_ahead, weight_ahead
    return blocks.forward(args, _rows, _size(weight_CD))


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `blocks.backward`."""
    return blocks.backward(args, outputs, grads, needs, _rows, _size(args[1]))


def _size(weight_CD: Tensor) -> int:
    return max(1, BLOCK // max(1, len(weight_CD)))


def _rows(logits, target, scale, options, losses, dtype) -> Tensor | None:
    """With p = softmax(z): dz = p (1 + 2 z_loss lse) - (1 - smoothing) onehot - smoothing / C; z capped or not."""
    softcap, z_loss, smoothing = options
    if softcap:
        logits.div_(softcap).tanh_().mul_(softcap)
    slope = 1 - (logits / softcap).square_() if softcap and dtype is not None else None
    norm = logits.logsumexp(1) if z_loss else None
    logp, real = logits.log_softmax(1), target != IGNORE  # one pass of torch's own, much faster than logsumexp
    target = target.clamp(min=0)[:, None]
    if losses is not None:
        loss = (smoothing - 1) * logp.gather(1, target)[:, 0]
        loss = loss - smoothing * logp.mean(1) if smoothing else loss
        loss = loss + z_loss * norm.square() if z_loss else loss
        losses.copy_(torch.where(real, loss, 0))
    if dtype is None:
        return None
    d = logp.exp_()
    if z_loss:
        d.mul_((1 + 2 * z_loss * norm)[:, None])
    if smoothing:
        d.sub_(smoothing / d.shape[1])
    d.scatter_add_(1, target, d.new_full((), smoothing - 1).expand_as(target))
    d = d if slope is None else d.mul_(slope)
    return d.mul_(torch.where(real, 1 if scale is None else scale, 0)[:, None])
