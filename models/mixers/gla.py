"""Gated linear attention: a matrix memory in which every key channel forgets at a rate that the token decides.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T;  y_t = S_t^T q_t / sqrt(K)
    a_t = sigmoid(W_2 W_1 x_t + b)^(1/16);  out = W_o (RMSNorm_h(y) silu(W_g x))

arXiv 2312.06635. The gate is of low rank, and its root keeps it near one. Keys are half as wide as values.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import at_least
from models.layers.matrix_memory import MatrixMemory
from models.layers.norm import RMSNorm
from models.span import Span
from models.state import State
from models.stateful import Place


class GLA(MatrixMemory):
    @dataclass(frozen=True)
    class Config:
        """keys: width of all keys together, in dims. rank: of the gate. root: the gate is taken to the power 1/root."""

        heads: int = 4
        keys: float = 0.5
        rank: int = 16
        root: float = 16.0

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        at_least(config, rank=1)
        key_dim = int(config.keys * self.head_dim)
        if key_dim < 1 or not config.root:
            raise ValueError(f"gla: keys={config.keys} must leave a head a key channel, root={config.root} be above 0")
        self.size = (config.heads, key_dim, self.head_dim)
        keys = config.heads * key_dim
        self.widths = [keys, keys, place.dim, place.dim, config.rank]  # q, k, v, gate of the output, low rank
        self.wi = nn.Linear(place.dim, sum(self.widths), bias=False)
        self.wa = nn.Linear(config.rank, keys)
        self.norm = RMSNorm(self.head_dim, 1e-5)
        self.wo = nn.Linear(place.dim, place.dim, bias=False)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        *heads, low_BTR = self.wi(x_BTD).split(self.widths, -1)
        q_BTHK, k_BTHK, v_BTHV, gate_BTHV = map(self.by_head, heads)
        decay_BTHK = F.logsigmoid(self.by_head(self.wa(low_BTR)).float()) / self.config.root
        y_BTHV, state = self.remember(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, at, state, scale=self.size[1] ** -0.5)
        return self.wo((self.norm(y_BTHV) * F.silu(gate_BTHV)).flatten(2)), state
