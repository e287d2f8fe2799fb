"""The feed-forward layer of the first transformers: two projections with biases around one activation.

    y = W_o act(W_i x + b_i) + b_o

arXiv 1706.03762, with GELU (1606.08415) in BERT's family.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models.layers.activation import activate
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful

Activation = Literal["gelu", "gelu_tanh", "relu"]


class MLP(Stateful):
    kind = "ffn"
    family = "feedforward"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """hidden: units, 0 means 4 dim."""

        hidden: int = 0
        activation: Activation = "gelu"

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden or 4 * place.dim
        self.wi, self.wo = nn.Linear(place.dim, hidden), nn.Linear(hidden, place.dim)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        return self.wo(activate(self.wi(x_BTD), self.config.activation)), state
