"""Channel mix of RWKV: a squared-ReLU feed-forward layer whose input leans on the token before.

    y_t = W_o relu(W_i (x_t + mu (x_{t-1} - x_t)))^2   [times sig(W_r (x_t + mu_r (x_{t-1} - x_t)))]

arXiv 2503.14456 (RWKV-7); with `receptance`, the gate in brackets, 2305.13048 (RWKV-4) and 2404.05892 (5 and 6). W_o
starts at zero, mu by channel and depth, as there.
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
        """hidden: units, 0 means 4 dim. receptance: a gate on what is written, as before RWKV-7."""

        hidden: int = 0
        receptance: bool = False

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden or 4 * place.dim
        channel, depth = torch.arange(place.dim) / place.dim, 1 - place.layer / place.layers
        self.mix = nn.Parameter(1 - channel ** (depth if config.receptance else depth**4))
        self.wi = nn.Linear(place.dim, hidden, bias=False)
        if config.receptance:
            self.mix_r = nn.Parameter(1 - channel**depth)
            self.wr = nn.Linear(place.dim, place.dim, bias=False)
        self.wo = nn.Linear(hidden, place.dim, bias=False)
        nn.init.zeros_(self.wo.weight)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        return {"shift": TensorSpec((self.wo.out_features,), self.wo.weight.dtype)}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        before_BTD, tail = previous(x_BTD, at, None if state is None else state["shift"])
        y_BTD = self.wo(self.wi(torch.lerp(x_BTD, before_BTD, self.mix)).relu().square())
        if self.config.receptance:
            y_BTD = self.wr(torch.lerp(x_BTD, before_BTD, self.mix_r)).sigmoid() * y_BTD
        return y_BTD, None if state is None else {"shift": tail}
