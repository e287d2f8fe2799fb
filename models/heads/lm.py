"""Language-model head: a projection to the vocabulary, and its cross-entropy without ever holding all logits.

l = scale W x,   capped where there is a softcap: softcap tanh(l / softcap)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class LM(Stateful):
    """added: its parameters, by the beginnings of their names, that guess further than the next token."""

    family = "transformer"
    added: tuple[str, ...] = ()

    @dataclass(frozen=True)
    class Config:
        """logit_scale: a factor of them. softcap: their bound, 0 for none (arXiv 2408.00118)."""

        logit_scale: float = 1.0
        softcap: float = 0.0

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(place.vocab, place.dim) * place.dim**-0.5)

    def begin(self) -> None:
        """Called when the weights of a decoder whose head had nothing added have been filled in."""

    def forward(
        self, x_BTD: Tensor, at: Span, state: State | None = None, targets_BT: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Logits (B, T, C) in the dtype of x; with targets each token's loss, (B, T) fp32, 0 where it is -100."""
        cap = self.config.softcap
        if self.config.logit_scale != 1:
            x_BTD = x_BTD * self.config.logit_scale
        if targets_BT is None:
            logits_BTC = F.linear(x_BTD, self.weight)
            return (cap * (logits_BTC / cap).tanh() if cap else logits_BTC), state
        losses_N = kernels.linear_cross_entropy(x_BTD.flatten(0, 1), self.weight, targets_BT.flatten(), softcap=cap)
        return losses_N.view_as(targets_BT), state
