"""Scalable softmax: scores grow with log n, so that attention does not flatten as a document grows.

    p = softmax(s log(n) / m l),   n the tokens a query reads, s learned for each head

arXiv 2501.19399. m is the mean of log n over a document of `length` tokens. Dividing by it is a change of units: s is 1
at the start, and scores about as large as a softmax's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from models.stateful import Place


class SSMax(nn.Module):
    family = "attention"

    @dataclass(frozen=True)
    class Config:
        """length: tokens of the documents it is trained on."""

        length: int = 1024

    def __init__(self, config: Config, heads: int, place: Place) -> None:
        super().__init__()
        if config.length < 2:
            raise ValueError(f"ssmax.length={config.length}: must be at least 2")
        self.mean = sum(map(math.log, range(1, config.length + 1))) / config.length
        self.s_H = nn.Parameter(torch.ones(heads))

    def forward(self, q_BTHK: Tensor, view: kernels.View, **options) -> Tensor:
        """As `Softmax.forward`."""
        return kernels.attention(q_BTHK, view, ssmax_H=self.s_H / self.mean, **options)
