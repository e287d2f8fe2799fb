"""LSTM: a cell that is kept, added to and read through gates, the recurrent network that learnt long dependencies.

    i, f, g, o = W x_t + U h_{t-1} + b;  c_t = sig(f) c_{t-1} + sig(i) tanh(g);  h_t = sig(o) tanh(c_t)

Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000. Weights map one to one on `torch.nn.LSTM` (its
two biases are one here). Forget biases start at 1 (Jozefowicz et al. 2015); a projection follows if hidden is not dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful


class LSTM(Stateful):
    family = "recurrent"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """hidden: units, 0 means dim."""

        hidden: int = 0

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.hidden = hidden = config.hidden or place.dim
        self.wi = nn.Linear(place.dim, 4 * hidden, bias=False)
        self.recurrent = nn.Parameter(torch.empty(4 * hidden, hidden).uniform_(-1, 1) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(4, hidden).index_fill_(0, torch.tensor(1), 1.0).flatten())
        self.wo = nn.Identity() if hidden == place.dim else nn.Linear(hidden, place.dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        spec = TensorSpec((self.hidden,), torch.float32)
        return {"hidden": spec, "cell": spec}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        carried = state or {}
        y_BTH, hidden, cell = kernels.lstm(
            self.wi(x_BTD) + self.bias,
            self.recurrent,
            hidden_BU=carried.get("hidden"),
            cell_BU=carried.get("cell"),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        return self.wo(y_BTH), None if state is None else {"hidden": hidden, "cell": cell}
