"""Entmax: weights that are exactly zero far enough below the largest.

    p_j = relu((alpha - 1) l_j - t)^(1 / (alpha - 1)),   t such that they sum to 1

arXiv 1905.05702 (1.5-entmax), 1602.02068 (sparsemax, alpha = 2), 1909.00015 (in transformers). The scores of a call are
written out whole.
"""

from dataclasses import dataclass

from torch import Tensor, nn

import kernels
from models.layers.dense import weighted
from models.stateful import Place


class Entmax(nn.Module):
    family = "attention"

    @dataclass(frozen=True)
    class Config:
        """alpha: above 1; 2 is sparsemax, towards 1 it becomes softmax."""

        alpha: float = 1.5

    def __init__(self, config: Config, heads: int, place: Place) -> None:
        super().__init__()
        if config.alpha <= 1:
            raise ValueError(f"entmax.alpha={config.alpha}: must be above 1")
        self.config = config

    def forward(self, q_BTHK: Tensor, view: kernels.View, **options) -> Tensor:
        """As `Softmax.forward`."""
        return weighted(q_BTHK, view, lambda scores: kernels.entmax(scores, alpha=self.config.alpha), **options)
