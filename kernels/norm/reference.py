"""RMS and layer normalisation, the definition."""

import torch
from torch import Tensor


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, center: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """y of x's shape and dtype, and x + residual, empty without one. Statistics in fp32 at least."""
    stream = x if residual is None else x + residual
    wide = stream.to(torch.promote_types(x.dtype, torch.float32))
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.to(y.dtype)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype), x.new_zeros(0) if residual is None else stream
