"""Kimi Delta Attention: the gated delta rule with a decay for each channel, so each row of memory has its own clock.

    S_t = diag(exp(g_t)) S_{t-1};  S_t += b_t k_t (v_t - S_t^T k_t)^T;  y_t = S_t^T q_t / sqrt(K)
    g_t = -exp(A) softplus(W_f' W_f x_t + dt),  b_t = sigmoid(.),  out = W_o (RMSNorm(y) sigmoid(W_z' W_z x_t))

arXiv 2510.26692. q, k, v pass a short causal convolution with SiLU; q and k are L2-normalised. The decay and the output
gate are of rank K. As in the paper a model puts one full attention without positions after every three of these:
`3*kda mla(...)`.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import at_least
from models.layers.decays import draw_log_decay, draw_step_bias
from models.layers.delta_memory import DeltaMemory
from models.layers.unit import unit
from models.span import Span
from models.state import State
from models.stateful import Place


class KDA(DeltaMemory):
    @dataclass(frozen=True)
    class Config:
        """head_dim: of keys and values, 0 means dim / heads. conv: taps."""

        heads: int = 4
        head_dim: int = 0
        conv: int = 4

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1, conv=2)
        if not config.head_dim and place.dim % config.heads:
            raise ValueError(f"kda: dim={place.dim} must be a multiple of heads={config.heads}, or give head_dim")
        self.config = config
        self.head_dim = config.head_dim or place.dim // config.heads
        width = config.heads * self.head_dim
        self.widths = [3 * width, self.head_dim, self.head_dim, config.heads]  # q k v together, f, z, b
        self.wi = nn.Linear(place.dim, sum(self.widths), bias=False)
        self.wf = nn.Linear(self.head_dim, width, bias=False)
        self.wz = nn.Linear(self.head_dim, width, bias=False)
        self.log_decay = nn.Parameter(draw_log_decay(config.heads))
        self.step_bias = nn.Parameter(draw_step_bias(width))
        self.remember_in((config.heads, self.head_dim, self.head_dim), 3 * width, config.conv, place)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        heads = self.config.heads
        qkv_BTD, f_BTK, z_BTK, b_BTH = self.wi(x_BTD).split(self.widths, -1)
        qkv_BTD, tail = self.convolved(qkv_BTD, at, state)
        q_BTHK, k_BTHK, v_BTHK = qkv_BTD.unflatten(-1, (3 * heads, self.head_dim)).chunk(3, 2)
        step_BTHK = F.softplus(self.wf(f_BTK).float() + self.step_bias.float()).unflatten(-1, (heads, self.head_dim))
        decay_BTHK = -self.log_decay.float().exp()[:, None] * step_BTHK
        y_BTHK, matrix = self.corrected(
            unit(q_BTHK), unit(k_BTHK), v_BTHK, decay_BTHK, b_BTH.float().sigmoid(), at, state
        )
        gate_BTHK = self.wz(z_BTK).float().sigmoid().unflatten(-1, (heads, self.head_dim))
        return self.told(y_BTHK, gate_BTHK, x_BTD.dtype), None if state is None else {"conv": tail, "matrix": matrix}
