"""Channel mix of RWKV-7: a squared-ReLU feed-forward layer whose input leans on the token before.

    y_t = W_o relu(W_i (x_t + mu (x_{t-1} - x_t)))^2

arXiv 2503.14456. W_o starts at zero, mu by channel and depth, as there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.layers.shift import previous
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful


class ChannelMix(Stateful):
    family = "feedforward"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """hidden: units, 0 means 4 dim."""

        hidden: int = 0

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        hidden = config.hidden or 4 * place.dim
        depth = 1 - place.layer / place.layers
        self.mix = nn.Parameter(1 - (torch.arange(place.dim) / place.dim) ** depth**4)
        self.wi = nn.Linear(place.dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, place.dim, bias=False)
        nn.init.zeros_(self.wo.weight)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        return {"shift": TensorSpec((self.wo.out_features,), self.wo.weight.dtype)}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        before_BTD, tail = previous(x_BTD, at, None if state is None else state["shift"])
        hidden_BTF = self.wi(torch.lerp(x_BTD, before_BTD, self.mix)).relu().square()
        return self.wo(hidden_BTF), None if state is None else {"shift": tail}
