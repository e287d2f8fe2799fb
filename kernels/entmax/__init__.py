"""Sparse softmax: weights that are exactly 0 far enough below the largest."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.entmax.chunked import chunked, grad
from kernels.entmax.reference import reference


def _fake(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((*x.shape[:-1], 1), dtype=wide)


_op = op.Op("entmax", reference, chunked, _fake, grad=grad, saved=1, twice=reference)


def entmax(x: Tensor, dim: int = -1, *, alpha: float = 1.5) -> Tensor:
    """The p that maximises p . x + H_alpha(p) over distributions on `dim` (arXiv 1905.05702).

        p_i = relu((alpha - 1) x_i - t)^(1 / (alpha - 1)),  t such that sum p = 1

    x of any shape, floating; p of its shape and dtype, computed in fp32 (fp64 for fp64). alpha > 1: 2 is sparsemax
    (arXiv 1602.02068), towards 1 it becomes softmax. An entry of -inf is masked; a row needs one that is finite.
    Raises TypeError or ValueError naming the argument, IndexError for a dimension that is not there.
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError("entmax: x must be a tensor of at least one dimension")
    check.floating("entmax", "x", x)
    if not 1 < alpha < float("inf"):
        raise ValueError(f"entmax: alpha={alpha} must be above 1")
    return _op(x.movedim(dim, -1), float(alpha)).movedim(-1, dim)
