"""Megalodon: attention inside chunks, joined by averages that turn as they fade and by a norm over time.

    n = TimestepNorm(x);  m = RMSNorm(CEMA(n));  z = RMSNorm_h(W_z m);  q, k = z (1 + gamma) / sqrt(Z) + beta
    o = softmax(q k) silu(W_v n), inside chunks;  y = W_o [m, silu(W_r m) o]

arXiv 2404.08801. Queries and keys turn with their positions. As in the authors' code no phase on the input. The two-hop
residual is the block's: `block="norm_placement(placement=two_hop)"`. Differs from the paper: a block's own norm stands
before the timestep norm, and the two maps to the stream are one, of both inputs together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.config import at_least, parse_part
from models.layers.chunked import by_parity
from models.layers.ema import EMA
from models.layers.norm import RMSNorm
from models.layers.timestep_norm import TimestepNorm
from models.span import Span
from models.state import State, TensorSpec, append
from models.stateful import Place, Stateful


class Megalodon(Stateful):
    family = "attention"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """shared: channels of z, 0 means dim / 4. values: 0 means 2 dim. averages: for each channel.

        groups: of the norm. chunk: tokens the attention stays in. positions: a scheme of models/positions.
        """

        heads: int = 1
        shared: int = 0
        values: int = 0
        averages: int = 16
        groups: int = 4
        chunk: int = 2048
        positions: str = "rope"

        @classmethod
        def tiny(cls) -> "Megalodon.Config":
            return cls(heads=2, chunk=8)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1, averages=1, groups=1, chunk=1)
        self.config, dim = config, place.dim
        self.shared, self.values = config.shared or dim // 4, config.values or 2 * dim
        for name, width in (("shared", self.shared), ("values", self.values)):
            if width % config.heads or not width:
                raise ValueError(f"megalodon: {name}={width} must be a multiple of heads={config.heads}")
        if dim % config.groups:
            raise ValueError(f"megalodon: dim={dim} must be a multiple of groups={config.groups}")
        self.head_dim = self.shared // config.heads
        positions, positions_config = parse_part(config.positions, "position")
        self.positions = positions(positions_config, self.head_dim, config.heads, place)
        self.norm = TimestepNorm(dim, config.groups, place.eps)
        self.ema = EMA(dim, config.averages, turning=True)
        self.ema_norm = RMSNorm(dim, place.eps)
        self.wi = nn.Linear(dim, self.shared + self.values, bias=False)  # z r
        self.wv = nn.Linear(dim, self.values, bias=False)
        self.gamma, self.beta = (nn.Parameter(torch.zeros(2, self.shared)) for _ in range(2))
        self.wo = nn.Linear(dim + self.values, dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        heads, chunk, dtype = self.config.heads, self.config.chunk, self.wo.weight.dtype
        return {
            "norm": self.norm.spec,
            "ema": self.ema.spec,
            "k": TensorSpec((heads, self.head_dim + 2), dtype, every=1, window=chunk),
            "v": TensorSpec((heads, self.values // heads), dtype, every=1, window=chunk),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        heads, carried = self.config.heads, state or {}
        n_BTD, statistics = self.norm(x_BTD, at, carried.get("norm"))
        m_BTD, averages = self.ema(n_BTD, at, carried.get("ema"))
        m_BTD = self.ema_norm(m_BTD)
        z_BTD, r_BTD = self.wi(m_BTD).split([self.shared, self.values], -1)
        z_BTD = kernels.rms_norm(z_BTD.unflatten(-1, (heads, self.head_dim)), eps=self.ema_norm.eps).flatten(2)
        q_BTHK, k_BTHK = (
            (z_BTD * ((1 + gamma) * self.head_dim**-0.5) + beta).unflatten(-1, (heads, self.head_dim))
            for gamma, beta in zip(self.gamma, self.beta)
        )
        q_BTHK, k_BTHK = by_parity(
            self.positions.query(q_BTHK, at), self.positions.key(k_BTHK, at), at, self.config.chunk
        )
        v_BTHV = F.silu(self.wv(n_BTD)).unflatten(-1, (heads, -1))
        view, after = append(state, at, k=k_BTHK, v=v_BTHV)
        options = {"window": self.config.chunk, "scale": 1.0, "slopes_H": self.positions.slopes_H}
        o_BTD = kernels.attention(q_BTHK, view, **options).flatten(2)
        y_BTD = self.wo(torch.cat([m_BTD, F.silu(r_BTD) * o_BTD], -1))
        return y_BTD, None if state is None else {"norm": statistics, "ema": averages, **after}
