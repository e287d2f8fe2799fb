"""The gated unit for CPUs: torch's fused silu, and its gradient from the inputs alone."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels import cpu


def chunked(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference`."""
    if cpu.serves(gate, up):
        return torch.ops.edifice_cpu.swiglu(gate, up)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """dup = g silu(gate), dgate = g up silu'(gate)."""
    dtype = args[0].dtype
    gate, up, g = (x.to(torch.promote_types(dtype, torch.float32)) for x in (*args, grads[0]))
    found = []
    if needs[0]:
        found.append(torch.ops.aten.silu_backward(g * up, gate).to(dtype))
    if needs[1]:
        found.append((silu(gate) * g).to(dtype))
    return found
