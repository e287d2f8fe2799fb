"""The loss of a language model's last layer, without ever holding all logits."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.linear_cross_entropy.chunked import chunked, grad
from kernels.linear_cross_entropy.reference import reference


def _fake(
    x_ND: Tensor,
    weight_CD: Tensor,
    targets_N: Tensor,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    x_ahead: bool = False,
    weight_ahead: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    losses_N = x_ND.new_empty(x_ND.shape[:1], dtype=torch.promote_types(x_ND.dtype, torch.float32))
    dx = x_ND.new_empty(x_ND.shape if x_ahead else 0)
    dw = weight_CD.new_empty(weight_CD.shape) if weight_ahead else x_ND.new_empty(0)
    return losses_N, dx, dw


_op = op.Op("linear_cross_entropy", reference, chunked, _fake, grad=grad, saved=2, twice=reference)


def linear_cross_entropy(
    x_ND: Tensor,
    weight_CD: Tensor,
    targets_N: Tensor,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits z = x W^T at each token: logsumexp(z) - z_target.

    x (N, D) and weight (C, D) floating point; targets (N) int64 classes, -100 for none: such a row of x
    is not looked at.
    softcap: z = softcap tanh(x W^T / softcap), 0 for none (arXiv 2408.00118). z_loss: this times logsumexp(z)^2 is
    added to each loss (arXiv 2204.02311). label_smoothing: this share of the target goes to all classes alike.
    Returns losses (N) in fp32 (fp64 for fp64), 0 where there is no target. Gradients for x and weight; made in forward
    if autograd records, so that a training step with one gradient for all losses (a sum, a mean over the targets) takes
    three matrix products; other gradients of the losses take two more.
    Raises ValueError or TypeError naming the argument; on a GPU a target that is no class makes its loss NaN.
    """
    name = "linear_cross_entropy"
    check.shape(name, "x_ND", x_ND, (None, None), "(N, D)")
    check.shape(name, "weight_CD", weight_CD, (None, x_ND.shape[1]), f"(C, D={x_ND.shape[1]}), D from x_ND")
    check.shape(name, "targets_N", targets_N, (x_ND.shape[0],), f"(N={x_ND.shape[0]},), N from x_ND")
    check.floating(name, "x_ND", x_ND)
    check.floating(name, "weight_CD", weight_CD)
    check.whole(name, "targets_N", targets_N)
    check.device(name, "weight_CD", weight_CD, x_ND)
    check.device(name, "targets_N", targets_N, x_ND)
    for label, value in (("softcap", softcap), ("z_loss", z_loss)):
        if value < 0:
            raise ValueError(f"{name}: {label}={value} must be at least 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{name}: label_smoothing={label_smoothing} must be at least 0 and below 1")
    ahead = [torch.is_grad_enabled() and x.requires_grad for x in (x_ND, weight_CD)]
    return _op(x_ND, weight_CD, targets_N, float(softcap), float(z_loss), float(label_smoothing), *ahead)
