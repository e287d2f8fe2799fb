"""Routing tokens to experts: the choice, its weights, and the order that brings the rows of an expert together."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.routing.chunked import chunked, grad
from kernels.routing.dispatch import dispatch
from kernels.routing.reference import reference

__all__ = ["dispatch", "route"]


def _fake(
    logits_NE: Tensor, bias_E: Tensor | None, k: int, groups: int, best: int, score: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits_NE.shape[0], k
    wide = torch.promote_types(logits_NE.dtype, torch.float32)
    chosen, again = (logits_NE.new_empty(shape, dtype=dtype) for dtype in (torch.int64, torch.int32))
    return logits_NE.new_empty(shape, dtype=wide), chosen, again


_op = op.Op("routing", reference, chunked, _fake, grad=grad, saved=1, twice=reference)


def route(
    logits_NE: Tensor,
    k: int,
    *,
    bias_E: Tensor | None = None,
    groups: int = 1,
    best_groups: int = 1,
    score: str = "softmax",
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """The k experts of each token with the highest scores, and their weights.

    logits (N, E) floating. Returns experts (N, k) int64, from the first choice to the last and of equals the lower
    number first, and weights (N, k), fp32 (fp64 for fp64), with gradients for the logits.
    score: softmax or sigmoid of the logits. normalize: the k weights are divided by their sum.
    bias (E): added to the scores for the choice alone (arXiv 2408.15664); has no gradient.
    groups: E falls into so many runs; only those best_groups count whose two highest scores have the largest sum (arXiv
    2412.19437). k experts must fit into them. Raises ValueError or TypeError naming the argument.
    """
    check.shape("route", "logits_NE", logits_NE, (None, None), "(N, E)")
    check.floating("route", "logits_NE", logits_NE)
    count = logits_NE.shape[1]
    if bias_E is not None:
        check.shape("route", "bias_E", bias_E, (count,), f"(E={count},), E from logits_NE")
        check.floating("route", "bias_E", bias_E)
        check.device("route", "bias_E", bias_E, logits_NE)
    if groups < 1 or count % groups:
        raise ValueError(f"route: groups={groups} must divide E={count}")
    if not 1 <= best_groups <= groups:
        raise ValueError(f"route: best_groups={best_groups} must be 1..groups={groups}")
    if not 1 <= k <= best_groups * (count // groups):
        raise ValueError(f"route: k={k} must be 1..{best_groups * (count // groups)}, the experts that can be chosen")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"route: score={score!r} must be softmax or sigmoid")
    weights_Nk, experts_Nk = _op(logits_NE, bias_E, k, groups, best_groups, score, normalize)
    return experts_Nk, weights_Nk
