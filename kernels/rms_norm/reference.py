"""RMS normalisation, the definition: y = x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

import torch
from torch import Tensor


def reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (..., D), weight (D) or None. Statistics and weight in fp32 at least, the result in x.dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)
