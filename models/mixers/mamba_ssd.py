"""Mamba-2 (SSD): a state space whose transition is one number per head and token, so that it is also masked attention.

    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T;  y_t = S_t^T C_t + D x_t
    dt = softplus(. + bias),  A = -exp(log_decay),  out = W_o RMSNorm(y silu(z))

arXiv 2405.21060. x, B and C pass a short causal convolution with SiLU; the heads of a group share B and C. As in the
released models the norm runs over all heads and comes after the gate; as in those of Nemotron-H, if asked, over each
group's alone, and dt has bounds.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.config import at_least
from models.layers.decays import draw_log_decay, draw_step_bias
from models.layers.norm import RMSNorm
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful


class MambaSSD(Stateful):
    family = "ssm"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """heads: 0 means expand * dim / head_dim. state: rows of a head's memory, N. groups: of heads, sharing B, C.

        group_norm: the norm runs over the heads of a group. limits: of dt, the lower alone or both.
        """

        heads: int = 0
        head_dim: int = 64
        state: int = 64
        groups: int = 1
        conv: int = 4
        expand: int = 2
        group_norm: bool = False
        limits: tuple[float, ...] = ()

        @classmethod
        def tiny(cls) -> "MambaSSD.Config":
            return cls(head_dim=16, groups=2, limits=(0.001, 0.7))

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, head_dim=1, state=1, groups=1, expand=1)
        c = config
        if not c.heads and (c.expand * place.dim) % c.head_dim:
            raise ValueError(
                f"mamba_ssd: expand * dim = {c.expand * place.dim} is no multiple of head_dim={c.head_dim}; give heads"
            )
        if len(c.limits) > 2 or sorted(c.limits) != list(c.limits):
            raise ValueError(f"mamba_ssd.limits={c.limits}: give a lower bound of dt, or a lower and an upper one")
        self.config = config
        self.heads = c.heads or c.expand * place.dim // c.head_dim
        if self.heads % c.groups:
            raise ValueError(f"mamba_ssd: heads={self.heads} must be a multiple of groups={c.groups}")
        if c.conv < 2:
            raise ValueError(f"mamba_ssd: conv={c.conv} must be at least 2 taps")
        inner, shared = self.heads * c.head_dim, c.groups * c.state
        self.widths = [inner, inner + 2 * shared, self.heads]  # z, x B C together, dt
        self.wi = nn.Linear(place.dim, sum(self.widths), bias=False)
        self.conv = nn.Parameter(torch.empty(self.widths[1], c.conv).uniform_(-1, 1) * c.conv**-0.5)
        self.conv_bias = nn.Parameter(torch.empty(self.widths[1]).uniform_(-1, 1) * c.conv**-0.5)
        self.log_decay = nn.Parameter(draw_log_decay(self.heads))
        self.step_bias = nn.Parameter(draw_step_bias(self.heads))
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(inner, place.eps)
        self.wo = nn.Linear(inner, place.dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        c = self.config
        return {
            "conv": TensorSpec((c.conv - 1, self.widths[1]), self.wo.weight.dtype),
            "matrix": TensorSpec((self.heads, c.state, c.head_dim), torch.float32),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.config
        z_BTD, xbc_BTD, dt_BTH = self.wi(x_BTD).split(self.widths, -1)
        carried = state or {}
        xbc_BTD, tail = kernels.conv1d(
            xbc_BTD,
            self.conv,
            self.conv_bias,
            activation="silu",
            state_BWD=carried.get("conv"),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        shared = c.groups * c.state
        x_BTD, b_BTD, c_BTD = xbc_BTD.split([self.heads * c.head_dim, shared, shared], -1)
        x_BTHV = x_BTD.unflatten(-1, (self.heads, c.head_dim))
        b_BTHK, c_BTHK = (
            x.unflatten(-1, (c.groups, c.state)).repeat_interleave(self.heads // c.groups, 2) for x in (b_BTD, c_BTD)
        )
        dt_BTH = F.softplus(dt_BTH.float() + self.step_bias.float())
        dt_BTH = dt_BTH.clamp(*c.limits) if c.limits else dt_BTH
        y_BTHV, matrix = kernels.linear_attention(
            c_BTHK,
            b_BTHK,
            x_BTHV.float() * dt_BTH[..., None],
            -self.log_decay.float().exp() * dt_BTH,
            state_BHKV=carried.get("matrix"),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        y_BTHV = y_BTHV + self.skip.float()[:, None] * x_BTHV
        y_BTD = y_BTHV.flatten(2) * F.silu(z_BTD.float())
        if c.group_norm:
            y_BTGD = kernels.rms_norm(y_BTD.unflatten(-1, (c.groups, -1)), eps=self.norm.eps)
            y_BTD = y_BTGD.flatten(2) * self.norm.weight
        else:
            y_BTD = self.norm(y_BTD)
        return self.wo(y_BTD.to(x_BTD.dtype)), None if state is None else {"conv": tail, "matrix": matrix}
