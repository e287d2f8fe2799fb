"""Softmax over the scores of a query, as everybody does it.

    p_j = exp(l_j) / sum_i exp(l_i),   l = softcap * tanh(q . k * scale / softcap) where there is a cap

arXiv 1706.03762; softcap: 2408.00118 (Gemma 2); sinks, one more logit per head that takes weight and gives nothing:
2508.10925 (gpt-oss).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from models.stateful import Place


class Softmax(nn.Module):
    """What becomes of scores, built as `Score(config, heads, place)`; the others of this folder do the same."""

    family = "attention"

    @dataclass(frozen=True)
    class Config:
        """softcap: bound of a score, 0 for none. sinks: a learned logit of each head that stands for no token."""

        softcap: float = 0.0
        sinks: bool = False

    def __init__(self, config: Config, heads: int, place: Place) -> None:
        super().__init__()
        self.config = config
        self.sinks_H = nn.Parameter(torch.zeros(heads)) if config.sinks else None

    def forward(self, q_BTHK: Tensor, view: kernels.View, **options) -> Tensor:
        """Weighted values (B, T, H, V). options: scale, window, mask and slopes_H of `kernels.attention`."""
        return kernels.attention(q_BTHK, view, softcap=self.config.softcap, sinks_H=self.sinks_H, **options)
