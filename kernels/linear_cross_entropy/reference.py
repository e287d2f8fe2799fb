"""Cross-entropy of a linear classifier, the definition: all logits at once."""

import torch
from torch import Tensor

IGNORE = -100  # the target that means none


def reference(x_ND: Tensor, weight_CD: Tensor, targets_N: Tensor) -> Tensor:
    """losses_N = logsumexp(W x) - (W x)[target], 0 where the target is IGNORE."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    logits_NC = x_ND.to(wide) @ weight_CD.to(wide).T
    chosen_N = logits_NC.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets_N == IGNORE, 0, logits_NC.logsumexp(1) - chosen_N)
