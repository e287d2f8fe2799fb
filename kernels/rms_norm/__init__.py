"""RMS normalisation of the last dimension."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.rms_norm.chunked import chunked, grad
from kernels.rms_norm.reference import reference


def _fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = op.register("rms_norm", chunked, _fake, grad=grad)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x (..., D) floating point; weight (D) or None. Statistics and weight in fp32 (fp64 for fp64), result in x.dtype.
    Raises ValueError or TypeError naming the argument.
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError("rms_norm: x must be a tensor (..., D) of at least one dimension")
    check.floating("rms_norm", "x", x)
    if weight is not None:
        check.shape("rms_norm", "weight", weight, (x.shape[-1],), f"(D={x.shape[-1]},), the last size of x")
        check.floating("rms_norm", "weight", weight)
    if eps < 0:
        raise ValueError(f"rms_norm: eps={eps} must be at least 0")
    return op.choose(reference, chunked, _op)(x, weight, float(eps))
