"""Medusa: further heads on the same output, each guessing the token one step further ahead, for drafts.

    p_k = softmax(W_k (x + silu(V_k x))),   k = 1..K guesses token t + 1 + k from the output at t

arXiv 2401.10774. V_k starts at zero and W_k as the language-model head, so that every head begins by repeating it.
Loss: sum_k weight 0.8^k CE_k. Guesses stand in segments as targets do: none reaches into the next document.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from models.config import at_least
from models.heads.lm import LM
from models.layers.ahead import mean, targets_ahead
from models.span import Span
from models.state import State
from models.stateful import Place

DECAY = 0.8


class Medusa(LM):
    added = ("inner", "outer")

    @dataclass(frozen=True)
    class Config(LM.Config):
        """heads: tokens guessed beyond the next one. weight: of their losses beside that of the next token."""

        heads: int = 3
        weight: float = 0.2

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        at_least(config, heads=1)
        self.config = config
        self.inner = nn.Parameter(torch.zeros(config.heads, place.dim, place.dim))
        self.outer = nn.Parameter(self.weight.detach().expand(config.heads, -1, -1).clone())

    @torch.no_grad()
    def begin(self) -> None:
        """Every head repeats the language-model head."""
        self.inner.zero_()
        self.outer.copy_(self.weight)

    def ahead(self, x: Tensor, head: int) -> Tensor:
        """What head `head` turns into logits, (..., D)."""
        return x + F.silu(F.linear(x, self.inner[head]))

    def forward(
        self, x_BTD: Tensor, at: Span, state: State | None = None, targets_BT: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        if targets_BT is not None and self.training:
            for head in range(self.config.heads):
                target_BT = targets_ahead(targets_BT, at, head + 1)
                guess_ND = self.ahead(x_BTD, head).flatten(0, 1)
                loss = mean(kernels.linear_cross_entropy(guess_ND, self.outer[head], target_BT.flatten()), target_BT)
                at.losses.append(self.config.weight * DECAY ** (head + 1) * loss)
                at.log(**{f"medusa_{head + 1}": loss})
        return super().forward(x_BTD, at, state, targets_BT)

    def guesses(self, x: Tensor, heads: int | None = None) -> Tensor:
        """Logits of the tokens after the next one, (..., heads, C), from outputs x (..., D); None: of all heads."""
        heads = self.config.heads if heads is None else heads
        return torch.stack([F.linear(self.ahead(x, head), self.outer[head]) for head in range(heads)], -2)
