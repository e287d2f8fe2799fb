"""The loss of a language model's last layer, without ever holding all logits."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.linear_cross_entropy.chunked import chunked, grad
from kernels.linear_cross_entropy.reference import reference


def _fake(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[:1], dtype=torch.promote_types(x_ND.dtype, torch.float32))


_op = op.Op("linear_cross_entropy", reference, chunked, _fake, grad=grad)


def linear_cross_entropy(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy of logits = x W^T at each token.

    x (N, D) and weight (C, D) floating point; targets (N) int64 classes, -100 for none.
    Returns losses (N) in fp32 (fp64 for fp64), 0 where there is no target. Gradients for x and weight.
    Raises ValueError or TypeError naming the argument.
    """
    name = "linear_cross_entropy"
    check.shape(name, "x_ND", x_ND, (None, None), "(N, D)")
    check.shape(name, "weight_CD", weight_CD, (None, x_ND.shape[1]), f"(C, D={x_ND.shape[1]}), D from x_ND")
    check.shape(name, "targets_N", targets_N, (x_ND.shape[0],), f"(N={x_ND.shape[0]},), N from x_ND")
    check.floating(name, "x_ND", x_ND)
    check.floating(name, "weight_CD", weight_CD)
    if targets_N.dtype != torch.int64:
        raise TypeError(f"{name}: targets_N must be int64, got {targets_N.dtype}")
    return _op(x_ND, weight_CD, targets_N)
