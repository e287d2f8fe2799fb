"""Cross-entropy of a linear classifier, the definition: all logits at once."""

import torch
from torch import Tensor

IGNORE = -100  # the target that means none


def reference(
    x_ND: Tensor,
    weight_CD: Tensor,
    targets_N: Tensor,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    x_ahead: bool = False,
    weight_ahead: bool = False,
) -> Tensor:
    """Losses (N), 0 where the target is IGNORE. The last two arguments are about when gradients are made: not here."""
    check_targets(targets_N, len(weight_CD))
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    logits_NC = looked_at(x_ND, targets_N).to(wide) @ weight_CD.to(wide).T
    if softcap:
        logits_NC = softcap * (logits_NC / softcap).tanh()
    norm_N = logits_NC.logsumexp(1)
    chosen_N = logits_NC.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    losses_N = norm_N - (1 - smoothing) * chosen_N - smoothing * logits_NC.mean(1) + z_loss * norm_N.square()
    return torch.where(targets_N == IGNORE, 0, losses_N)


def looked_at(x_ND: Tensor, targets_N: Tensor) -> Tensor:
    """x with rows without a target 0: NaN there may be, and would be in the gradient of the weight even times 0."""
    return x_ND.masked_fill((targets_N == IGNORE)[:, None], 0)


def check_targets(targets_N: Tensor, classes: int) -> None:
    """Raise unless each target is a class or IGNORE; not on a GPU, which would have to be waited for."""
    if targets_N.is_cpu and bool(((targets_N != IGNORE) & ((targets_N < 0) | (targets_N >= classes))).any()):
        raise ValueError(f"linear_cross_entropy: targets must be 0..{classes - 1} (the rows of weight), or {IGNORE}")
