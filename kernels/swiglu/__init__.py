"""The gated unit between the two projections of a SwiGLU feed-forward layer."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.swiglu.chunked import chunked, grad
from kernels.swiglu.reference import reference


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


_op = op.Op("swiglu", reference, chunked, _fake, grad=grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) * up (arXiv 2002.05202), elementwise.

    gate and up of one shape and one floating dtype, which y has too; computed in fp32 (fp64 for fp64) and rounded once.
    Backward keeps the two inputs and nothing else. Raises ValueError or TypeError naming the argument.
    """
    if not isinstance(gate, Tensor):
        raise TypeError(f"swiglu: gate must be a tensor, got {type(gate).__name__}")
    check.floating("swiglu", "gate", gate)
    check.shape("swiglu", "up", up, tuple(gate.shape), f"{tuple(gate.shape)}, the shape of gate")
    check.dtype("swiglu", "up", up, gate.dtype)
    check.device("swiglu", "up", up, gate)
    return _op(gate, up)
