"""Cross-entropy of a linear classifier, a block of tokens at a time: the logits of one block are all that exists.

Backward makes each block's logits again. bf16 inputs are widened, so that products add up in fp32.
"""

import torch
from torch import Tensor

from kernels.linear_cross_entropy.reference import IGNORE

BLOCK = 1 << 22  # logits held at a time


def chunked(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor) -> Tensor:
    """x (N, D), weight (C, D), targets (N) int64 -> losses (N); as `reference`."""
    weight_CD = _wide(weight_CD)
    losses = [x_ND.new_zeros(0, dtype=weight_CD.dtype)]
    for rows in _blocks(x_ND, weight_CD, targets_N):
        logits = _wide(x_ND[rows]) @ weight_CD.T
        target = targets_N[rows]
        loss = logits.logsumexp(1) - logits.gather(1, target.clamp(min=0)[:, None])[:, 0]
        losses.append(torch.where(target == IGNORE, 0, loss))
    return torch.cat(losses)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """With p = softmax(logits) - onehot(target), weighted by each loss's gradient: dx = p W, dW = p^T x."""
    x_ND, weight_CD, targets_N = args
    wide_CD = _wide(weight_CD)
    g_N = torch.where(targets_N == IGNORE, 0, grads[0])[:, None]
    dx_ND = torch.zeros_like(x_ND, memory_format=torch.contiguous_format) if needs[0] else None
    dw_CD = torch.zeros_like(wide_CD, memory_format=torch.contiguous_format) if needs[1] else None
    for rows in _blocks(x_ND, wide_CD, targets_N):
        x = _wide(x_ND[rows])
        p = (x @ wide_CD.T).softmax(1)
        target = targets_N[rows].clamp(min=0)[:, None]
        p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
        p.mul_(g_N[rows])
        if needs[0]:
            dx_ND[rows] = (p @ wide_CD).to(x_ND.dtype)
        if needs[1]:
            dw_CD.addmm_(p.T, x)
    return [found for found in (dx_ND, None if dw_CD is None else dw_CD.to(weight_CD.dtype)) if found is not None]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor) -> list[slice]:
    tokens, classes = len(x_ND), len(weight_CD)
    if tokens and bool(((targets_N != IGNORE) & ((targets_N < 0) | (targets_N >= classes))).any()):
        raise ValueError(f"linear_cross_entropy: targets must be 0..{classes - 1} (the rows of weight), or {IGNORE}")
    size = max(1, BLOCK // max(1, classes))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
