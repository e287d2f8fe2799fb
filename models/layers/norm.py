"""Normalisation with the kernels' numerics: statistics in fp32, output in the input's dtype."""

from typing import Literal

import torch
from torch import Tensor, nn

import kernels

Norm = Literal["rms", "layer", "layer_bias"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, eps=self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight [+ bias] over the last dimension (arXiv 1607.06450)."""

    def __init__(self, dim: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, eps=self.eps)


def make(kind: Norm, dim: int, eps: float) -> nn.Module:
    """The norm of a stack by its kind."""
    return RMSNorm(dim, eps) if kind == "rms" else LayerNorm(dim, eps, bias=kind == "layer_bias")
