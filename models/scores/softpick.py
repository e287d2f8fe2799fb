"""Softpick: weights that may all be zero, so no token has to be a sink and no activation grows into one.

    p_j = relu(exp(l_j) - 1) / sum_i |exp(l_i) - 1|

arXiv 2504.20966. The scores of a call are written out whole.
"""

from dataclasses import dataclass

from torch import Tensor, nn

import kernels
from models.layers.dense import weighted
from models.stateful import Place


class Softpick(nn.Module):
    family = "attention"

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, config: Config, heads: int, place: Place) -> None:
        super().__init__()

    def forward(self, q_BTHK: Tensor, view: kernels.View, **options) -> Tensor:
        """As `Softmax.forward`."""
        return weighted(q_BTHK, view, kernels.softpick, **options)
