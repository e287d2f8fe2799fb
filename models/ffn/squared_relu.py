"""Squared ReLU: a feed-forward layer without a gate, whose few active hidden units count by their square.

    y = W_o relu(W_i x)^2

arXiv 2109.08668 (Primer); the ffn of Nemotron-H, 2504.03624.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class SquaredReLU(Stateful):
    family = "feedforward"

    @dataclass(frozen=True)
    class Config:
        """hidden: units, 0 means 4 dim."""

        hidden: int = 0
        bias: bool = False

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        hidden = config.hidden or 4 * place.dim
        self.config = config
        self.wi = nn.Linear(place.dim, hidden, bias=config.bias)
        self.wo = nn.Linear(hidden, place.dim, bias=config.bias)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        return self.wo(self.wi(x_BTD).relu().square()), state
