"""Rectified softmax: attention weights that may all be zero, so that no token must be a sink."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.softpick.chunked import chunked, grad
from kernels.softpick.reference import reference


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = op.Op("softpick", reference, chunked, _fake, grad=grad, twice=reference)


def softpick(x: Tensor, dim: int = -1) -> Tensor:
    """y_i = relu(exp(x_i) - 1) / (sum_j |exp(x_j) - 1| + eps) over `dim` (arXiv 2504.20966).

    x of any shape, floating; y of its shape and dtype, computed in fp32 (fp64 for fp64). An entry of -inf is masked: 0,
    and not in the sum. A row without a positive entry is all 0. eps is 1e-8 of exp(max(x, 0)).
    Raises TypeError naming the argument, IndexError for a dimension that is not there.
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError("softpick: x must be a tensor of at least one dimension")
    check.floating("softpick", "x", x)
    return _op(x.movedim(dim, -1)).movedim(-1, dim)
