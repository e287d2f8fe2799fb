"""Shapes of what the C++ ops return, for tracing."""

import torch
from torch import Tensor


@torch.library.register_fake("edifice_cpu::packed_linear")
def _(x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, size: int, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


@torch.library.register_fake("edifice_cpu::attention")
def _(q: Tensor, k: Tensor, v: Tensor, *options) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.register_fake("edifice_cpu::rms_norm")
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("edifice_cpu::swiglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("edifice_cpu::argmax")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


@torch.library.register_fake("edifice_cpu::picked")
def _(weight: Tensor, ids: Tensor) -> Tensor:
    return weight.new_empty(ids.numel(), weight.shape[1])


@torch.library.register_fake("edifice_cpu::rope")
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)
