"""HGRN: an elementwise gated recurrence whose forget gates have a floor that rises with the layer.

    h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t);  f_t = b_l + (1 - b_l) sigmoid(W_f x_t)
    out = W_o (RMSNorm(h) silu(W_g x))

arXiv 2311.04823. Low layers can be quick, high layers have to be slow. Differs from the paper: real, as in the authors'
later code, not complex with a learnt phase; the bounds rise by a learnt share of what is left instead of
cumsum(softmax), see models/layers/forget_gate.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.config import at_least
from models.layers.forget_gate import ForgetGate
from models.layers.norm import RMSNorm
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful


class HGRN(Stateful):
    family = "attention"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """expand: width of the recurrence, in dims."""

        expand: int = 1

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, expand=1)
        self.config, self.width = config, config.expand * place.dim
        self.wi = nn.Linear(place.dim, 3 * self.width, bias=False)  # input, forget gate, output gate
        self.forget = ForgetGate(self.width, place)
        self.norm = RMSNorm(self.width, 1e-5)
        self.wo = nn.Linear(self.width, place.dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        return {"hidden": TensorSpec((self.width,), torch.float32)}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        i_BTD, f_BTD, gate_BTD = self.wi(x_BTD).chunk(3, -1)
        log_decay_BTD, write_BTD = self.forget(f_BTD, at)
        h_BTD, hidden = kernels.diagonal_scan(
            log_decay_BTD.exp(),
            F.silu(i_BTD) * write_BTD,
            state=None if state is None else state["hidden"],
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        y_BTD = self.norm(h_BTD).to(x_BTD.dtype) * F.silu(gate_BTD)
        return self.wo(y_BTD), None if state is None else {"hidden": hidden}
