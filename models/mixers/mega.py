"""Mega: one head of attention whose queries and keys have been averaged over time first, and gates around it.

    x' = silu(EMA(x));  z = silu(W_z x');  q, k = z kappa + mu;  v = silu(W_v x);  o = softmax(q k / sqrt(Z)) v
    y = sig(W_u x') (silu(W_h x' + U_h (silu(W_r x') o)) - x)

arXiv 2209.10655. Positions are rotary, one of the paper's two choices, and the softmax is its choice for text. With
`chunk` the attention stays inside runs of so many tokens and the averages carry the rest (Mega-chunk). Differs from the
paper: the x of the update gate is normalised, since it is what a mixer is given.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.config import at_least, parse_part
from models.layers.chunked import by_parity
from models.layers.ema import EMA
from models.span import Span
from models.state import State, TensorSpec, append
from models.stateful import Place, Stateful


class Mega(Stateful):
    family = "attention"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """shared: channels of z, 0 means dim / 4. values: 0 means 2 dim. averages: for each channel.

        chunk: tokens the attention stays in, 0 for no limit. positions: a scheme of models/positions.
        """

        shared: int = 0
        values: int = 0
        averages: int = 16
        chunk: int = 0
        positions: str = "rope"

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, averages=1)
        self.config, dim = config, place.dim
        self.shared, self.values = config.shared or max(2, dim // 4), config.values or 2 * dim
        positions, positions_config = parse_part(config.positions, "position")
        self.positions = positions(positions_config, self.shared, 1, place)
        self.ema = EMA(dim, config.averages)
        self.widths = [dim, dim, self.shared, self.values]  # u, h, z, r
        self.wi = nn.Linear(dim, sum(self.widths))
        self.wv = nn.Linear(dim, self.values)
        self.wh = nn.Linear(self.values, dim, bias=False)
        self.kappa = nn.Parameter(1 + torch.randn(2, self.shared) * 0.02)
        self.mu = nn.Parameter(torch.zeros(2, self.shared))

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        dtype, extra, window = self.wh.weight.dtype, 2 * (self.config.chunk > 0), self.config.chunk
        return {
            "ema": self.ema.spec,
            "k": TensorSpec((1, self.shared + extra), dtype, every=1, window=window),
            "v": TensorSpec((1, self.values), dtype, every=1, window=window),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        chunk = self.config.chunk
        averaged_BTD, averages = self.ema(x_BTD, at, None if state is None else state["ema"])
        u_BTD, h_BTD, z_BTK, r_BTV = self.wi(F.silu(averaged_BTD)).split(self.widths, -1)
        z_BTK = F.silu(z_BTK)
        q_BT1K, k_BT1K = ((z_BTK * kappa + mu)[:, :, None] for kappa, mu in zip(self.kappa, self.mu))
        q_BT1K, k_BT1K = self.positions.query(q_BT1K, at), self.positions.key(k_BT1K, at)
        if chunk:
            q_BT1K, k_BT1K = by_parity(q_BT1K, k_BT1K, at, chunk)
        view, after = append(state, at, k=k_BT1K, v=F.silu(self.wv(x_BTD))[:, :, None])
        options = {"window": chunk, "scale": self.shared**-0.5, "slopes_H": self.positions.slopes_H}
        o_BTV = kernels.attention(q_BT1K, view, **options).flatten(2)
        h_BTD = F.silu(h_BTD + self.wh(F.silu(r_BTV) * o_BTV))
        return u_BTD.sigmoid() * (h_BTD - x_BTD), None if state is None else {"ema": averages, **after}
