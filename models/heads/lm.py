"""Language-model head: a projection to the vocabulary, and its cross-entropy without ever holding all logits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class LM(Stateful):
    family = "transformer"

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(place.vocab, place.dim) * place.dim**-0.5)

    def forward(
        self, x_BTD: Tensor, at: Span, state: State | None = None, targets_BT: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Logits (B, T, C) in the dtype of x; with targets each token's loss, (B, T) fp32, 0 where it is -100."""
        if targets_BT is None:
            return F.linear(x_BTD, self.weight), state
        losses_N = kernels.linear_cross_entropy(x_BTD.flatten(0, 1), self.weight, targets_BT.flatten())
        return losses_N.view_as(targets_BT), state
