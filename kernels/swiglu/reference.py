"""The gated unit of SwiGLU, the definition."""

import torch
from torch import Tensor


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in fp32 at least, rounded once."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (wide * torch.sigmoid(wide) * up.to(wide.dtype)).to(gate.dtype)
