"""Routing for CPUs: a pass over the logits for each expert chosen, which takes the first of equals as no topk does."""

import torch
from torch import Tensor

from kernels.routing.reference import EPS


def chunked(
    logits_NE: Tensor, bias_E: Tensor | None, k: int, groups: int, best: int, score: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, and the experts once more, for `grad`; cannot be recorded by autograd."""
    logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
    score_NE = logits_NE.sigmoid() if score == "sigmoid" else logits_NE.softmax(1)
    biased_NE = score_NE if bias_E is None else score_NE + bias_E.to(score_NE.dtype)
    # What is closed or taken is -inf, below all others: a bias may be -inf.
    lowest = torch.finfo(logits_NE.dtype).min
    choice_NE = (logits_NE if bias_E is None else biased_NE).clamp(min=lowest)
    if best < groups:
        grouped_NGE = biased_NE.unflatten(1, (groups, -1))
        closed_NG = grouped_NGE.topk(min(2, grouped_NGE.shape[2]), 2).values.sum(2).clamp_(min=lowest)
        _first(closed_NG, best)
        choice_NE.unflatten(1, (groups, -1)).masked_fill_((closed_NG > -torch.inf)[..., None], -torch.inf)
    experts_Nk = _first(choice_NE, k)
    weights_Nk = score_NE.gather(1, experts_Nk)
    if normalize:
        weights_Nk /= weights_Nk.sum(1, keepdim=True) + EPS
    return weights_Nk, experts_Nk, experts_Nk.int()


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """To the logits, through the scores of the experts chosen; the choice itself has no slope, so the bias has none."""
    logits_NE, bias_E, *_, score, normalize = args
    experts_Nk, wide = outputs[0].long(), torch.promote_types(logits_NE.dtype, torch.float32)
    score_NE = logits_NE.to(wide).sigmoid() if score == "sigmoid" else logits_NE.to(wide).softmax(1)
    chosen_Nk, d_Nk = score_NE.gather(1, experts_Nk), grads[0].to(wide)
    if normalize:
        total_N1 = chosen_Nk.sum(1, keepdim=True) + EPS
        d_Nk = (d_Nk - (d_Nk * chosen_Nk).sum(1, keepdim=True) / total_N1) / total_N1
    d_Nk = d_Nk * chosen_Nk
    if score == "sigmoid":
        found_NE = torch.zeros_like(score_NE).scatter_(1, experts_Nk, d_Nk * (1 - chosen_Nk))
    else:
        found_NE = score_NE.mul_(-d_Nk.sum(1, keepdim=True)).scatter_add_(1, experts_Nk, d_Nk)
    found = [found_NE.to(logits_NE.dtype)] if needs[0] else []
    return found + ([torch.zeros_like(bias_E)] if needs[1] else [])


def _first(choice: Tensor, count: int) -> Tensor:
    """Columns of the largest numbers, the first of equals; those taken become -inf."""
    taken = []
    for _ in range(count):
        taken.append(choice.max(1, keepdim=True).indices)  # faster than argmax
        choice.scatter_(1, taken[-1], -torch.inf)
    return torch.cat(taken, 1)
