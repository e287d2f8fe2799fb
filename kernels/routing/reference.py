"""Routing tokens to experts, the definition."""

import torch
from torch import Tensor

EPS = 1e-20  # against 0 / 0 where the scores of all experts chosen vanish


def reference(
    logits_NE: Tensor, bias_E: Tensor | None, k: int, groups: int, best: int, score: str, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Weights (N, k), fp32 at least, and their experts (N, k) int64, from the first choice to the last."""
    logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
    score_NE = logits_NE.sigmoid() if score == "sigmoid" else logits_NE.softmax(1)
    with torch.no_grad():
        biased_NE = score_NE if bias_E is None else score_NE + bias_E.to(score_NE.dtype)
        # Without a bias logits choose as scores would, but that scores can be rounded to the same number.
        choice_NE = logits_NE if bias_E is None else biased_NE
        choice_NE = choice_NE.clamp(min=torch.finfo(choice_NE.dtype).min)  # a bias of -inf is above closed groups
        if best < groups:
            two_NG2 = biased_NE.unflatten(1, (groups, -1)).sort(dim=2, descending=True).values[..., :2]
            closed_NG = two_NG2.sum(2).sort(dim=1, descending=True, stable=True).indices[:, best:]
            closed_NE = torch.zeros_like(choice_NE).unflatten(1, (groups, -1))
            closed_NE.scatter_(1, closed_NG[..., None].expand(-1, -1, closed_NE.shape[2]), 1)
            choice_NE = choice_NE.masked_fill(closed_NE.flatten(1) > 0, -torch.inf)
        experts_Nk = choice_NE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights_Nk = score_NE.gather(1, experts_Nk)
    if normalize:
        weights_Nk = weights_Nk / (weights_Nk.sum(1, keepdim=True) + EPS)
    return weights_Nk, experts_Nk
