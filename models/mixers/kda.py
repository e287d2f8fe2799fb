"""Kimi Delta Attention: the gated delta rule with a decay for each channel, so each row of memory has its own clock.

    S_t = diag(exp(g_t)) S_{t-1};  S_t += b_t k_t (v_t - S_t^T k_t)^T;  y_t = S_t^T q_t / sqrt(K)
    g_t = -exp(A) softplus(W_f' W_f x_t + dt),  b_t = sigmoid(.),  out = W_o (RMSNorm(y) sigmoid(W_z' W_z x_t))

arXiv 2510.26692. q, k, v pass a short causal convolution with SiLU; q and k are L2-normalised. The decay and the output
gate are of rank K. As in the paper a model puts one full attention without positions after every three of these:
`3*kda mla(...)`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.config import at_least
from models.layers.decays import draw_log_decay, draw_step_bias
from models.layers.norm import RMSNorm
from models.layers.unit import unit
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful


class KDA(Stateful):
    family = "attention"
    keeps = True

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
        self.conv = nn.Parameter(torch.empty(3 * width, config.conv).uniform_(-1, 1) * config.conv**-0.5)
        self.wf = nn.Linear(self.head_dim, width, bias=False)
        self.wz = nn.Linear(self.head_dim, width, bias=False)
        self.log_decay = nn.Parameter(draw_log_decay(config.heads))
        self.step_bias = nn.Parameter(draw_step_bias(width))
        self.norm = RMSNorm(self.head_dim, place.eps)
        self.wo = nn.Linear(width, place.dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        c = self.config
        return {
            "conv": TensorSpec((c.conv - 1, self.widths[0]), self.wo.weight.dtype),
            "matrix": TensorSpec((c.heads, self.head_dim, self.head_dim), torch.float32),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        heads = self.config.heads
        qkv_BTD, f_BTK, z_BTK, b_BTH = self.wi(x_BTD).split(self.widths, -1)
        carried = state or {}
        qkv_BTD, tail = kernels.conv1d(
            qkv_BTD,
            self.conv,
            activation="silu",
            state_BWD=carried.get("conv"),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        q_BTHK, k_BTHK, v_BTHK = qkv_BTD.unflatten(-1, (3 * heads, self.head_dim)).chunk(3, 2)
        step_BTHK = F.softplus(self.wf(f_BTK).float() + self.step_bias.float()).unflatten(-1, (heads, self.head_dim))
        y_BTHK, matrix = kernels.gated_delta(
            unit(q_BTHK),
            unit(k_BTHK),
            v_BTHK,
            -self.log_decay.float().exp()[:, None] * step_BTHK,
            b_BTH.float().sigmoid(),
            state_BHKV=carried.get("matrix"),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        gate_BTHK = self.wz(z_BTK).float().sigmoid().unflatten(-1, (heads, self.head_dim))
        y_BTHK = (self.norm(y_BTHK).float() * gate_BTHK).to(x_BTD.dtype)
        return self.wo(y_BTHK.flatten(2)), None if state is None else {"conv": tail, "matrix": matrix}
