"""Medusa: further heads on the same output, each guessing the token one step further ahead, for drafts.

    p_k = softmax(W_k (x + silu(V_k x))),   k = 1..K guesses token t + 1 + k from the output at t

arXiv 2401.10774. V_k starts at zero; beside a trained model W_k starts as its head, so that every head repeats it.
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
        self.inner = nn.ModuleList(nn.Linear(place.dim, place.dim, bias=False) for _ in range(config.heads))
        self.outer = nn.ModuleList(nn.Linear(place.dim, place.vocab, bias=False) for _ in range(config.heads))
        for linear in self.inner:
            nn.init.zeros_(linear.weight)

    @torch.no_grad()
    def begin(self) -> None:
        """Every head repeats the language-model head."""
        for inner, outer in zip(self.inner, self.outer):
            inner.weight.zero_()
            outer.weight.copy_(self.weight)

    def ahead(self, x: Tensor, head: int) -> Tensor:
        """What head `head` turns into logits, (..., D)."""
        return x + F.silu(self.inner[head](x))

    def forward(
        self, x_BTD: Tensor, at: Span, state: State | None = None, targets_BT: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        if targets_BT is not None and self.training:
            for head in range(self.config.heads):
                target_BT = targets_ahead(targets_BT, at, head + 1)
                guess_ND = self.ahead(x_BTD, head).flatten(0, 1)
                loss_N = kernels.linear_cross_entropy(guess_ND, self.outer[head].weight, target_BT.flatten())
                loss = mean(loss_N, target_BT)
                at.losses.append(self.config.weight * DECAY ** (head + 1) * loss)
                at.log(**{f"medusa_{head + 1}": loss})
        return super().forward(x_BTD, at, state, targets_BT)

    def guesses(self, x: Tensor, heads: int | None = None) -> Tensor:
        """Logits of the tokens after the next one, (..., heads, C), from outputs x (..., D); None: of all heads."""
        heads = self.config.heads if heads is None else heads
        return torch.stack([self.outer[head](self.ahead(x, head)) for head in range(heads)], -2)
