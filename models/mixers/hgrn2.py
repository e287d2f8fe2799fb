"""HGRN2: the gated recurrence of HGRN, its state expanded to a matrix by an outer product; the gate is the key.

    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T;  y_t = S_t^T q_t / sqrt(K);   q = silu(W_q x)
    f_t = b_l + (1 - b_l) sigmoid(W_f x_t),  b_l rising with the layer;  out = W_o RMSNorm(y)

arXiv 2404.07904. What a channel forgets is what it takes in, k = 1 - f, so the memory stays a mean. The bounds rise by
a learnt share of what is left instead of cumsum(softmax), see models/layers/forget_gate.py.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.forget_gate import ForgetGate
from models.layers.matrix_memory import MatrixMemory
from models.layers.norm import RMSNorm
from models.span import Span
from models.state import State
from models.stateful import Place


class HGRN2(MatrixMemory):
    @dataclass(frozen=True)
    class Config:
        """key_dim: rows of a head's memory, 0 means dim / heads."""

        heads: int = 4
        key_dim: int = 0

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.size = (config.heads, config.key_dim or self.head_dim, self.head_dim)
        keys = config.heads * self.size[1]
        self.widths = [keys, keys, place.dim]  # q, forget gate, v
        self.wi = nn.Linear(place.dim, sum(self.widths), bias=False)
        self.forget = ForgetGate(keys, place)
        self.norm = RMSNorm(place.dim, 1e-5)
        self.wo = nn.Linear(place.dim, place.dim, bias=False)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        q_BTD, f_BTD, v_BTD = self.wi(x_BTD).split(self.widths, -1)
        parts = F.silu(q_BTD), *self.forget(f_BTD, at), v_BTD
        q_BTHK, decay_BTHK, k_BTHK, v_BTHV = map(self.by_head, parts)
        y_BTHV, state = self.remember(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, at, state, scale=self.size[1] ** -0.5)
        return self.wo(self.norm(y_BTHV.flatten(2))), state
