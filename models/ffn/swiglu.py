"""SwiGLU: a feed-forward layer whose hidden units are gated, y = W_o (silu(W_g x) * W_u x).

arXiv 2002.05202. The two input projections are one matrix.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class SwiGLU(Stateful):
    family = "feedforward"

    @dataclass(frozen=True)
    class Config:
        """hidden: gated units, 0 means 8/3 dim rounded up to a multiple of 16 (the parameters of a 4 dim MLP)."""

        hidden: int = 0
        bias: bool = False

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        hidden = config.hidden or -(-place.dim * 8 // 3 // 16) * 16
        self.wi = nn.Linear(place.dim, 2 * hidden, bias=config.bias)
        self.wo = nn.Linear(hidden, place.dim, bias=config.bias)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        gate, up = self.wi(x_BTD).chunk(2, -1)
        return self.wo(F.silu(gate) * up), state
