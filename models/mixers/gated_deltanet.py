"""Gated DeltaNet: a matrix memory that decays by a gate and corrects what a key already retrieves (the delta rule).

    S_t = exp(g_t) S_{t-1};  S_t += b_t k_t (v_t - S_t^T k_t)^T;  y_t = S_t^T q_t / sqrt(K)
    g_t = -exp(A) softplus(a_t + dt),  b_t = sigmoid(.),  out = W_o (RMSNorm(y) silu(z))

arXiv 2412.06464. q, k, v pass a short causal convolution with SiLU; q and k are L2-normalised. Fewer key than value
heads are allowed, as in Qwen3-Next: key head i serves the value heads of its group.
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


class GatedDeltaNet(Stateful):
    family = "attention"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """heads: of values. key_heads: of queries and keys. key_dim, value_dim: per head, 0 means dim / heads."""

        heads: int = 4
        key_heads: int = 2
        key_dim: int = 0
        value_dim: int = 0
        conv: int = 4

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1, key_heads=1)
        if config.heads % config.key_heads:
            raise ValueError(f"gated_deltanet: heads={config.heads} must be a multiple of key_heads={config.key_heads}")
        if not (config.key_dim and config.value_dim) and place.dim % config.heads:
            raise ValueError(
                f"gated_deltanet: dim={place.dim} is no multiple of heads={config.heads}; give key_dim and value_dim"
            )
        if config.conv < 2:
            raise ValueError(f"gated_deltanet: conv={config.conv} must be at least 2 taps")
        self.config = config
        self.key_dim = config.key_dim or place.dim // config.heads
        self.value_dim = config.value_dim or place.dim // config.heads
        keys, values = config.key_heads * self.key_dim, config.heads * self.value_dim
        self.widths = [2 * keys + values, values, config.heads, config.heads]  # q k v together, z, b, a
        self.wi = nn.Linear(place.dim, sum(self.widths), bias=False)
        self.conv = nn.Parameter(torch.empty(self.widths[0], config.conv).uniform_(-1, 1) * config.conv**-0.5)
        self.log_decay = nn.Parameter(draw_log_decay(config.heads))
        self.step_bias = nn.Parameter(draw_step_bias(config.heads))
        self.norm = RMSNorm(self.value_dim, place.eps)
        self.wo = nn.Linear(values, place.dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        c = self.config
        return {
            "conv": TensorSpec((c.conv - 1, self.widths[0]), self.wo.weight.dtype),
            "matrix": TensorSpec((c.heads, self.key_dim, self.value_dim), torch.float32),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.config
        qkv_BTD, z_BTD, b_BTH, a_BTH = self.wi(x_BTD).split(self.widths, -1)
        carried = state or {}
        qkv_BTD, tail = kernels.conv1d(
            qkv_BTD,
            self.conv,
            activation="silu",
            state_BWD=carried.get("conv"),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        keys = c.key_heads * self.key_dim
        q_BTD, k_BTD, v_BTD = qkv_BTD.split([keys, keys, c.heads * self.value_dim], -1)
        q_BTHK, k_BTHK = (unit(x.unflatten(-1, (c.key_heads, self.key_dim))) for x in (q_BTD, k_BTD))
        group = c.heads // c.key_heads
        y_BTHV, matrix = kernels.gated_delta(
            q_BTHK.repeat_interleave(group, 2),
            k_BTHK.repeat_interleave(group, 2),
            v_BTD.unflatten(-1, (c.heads, self.value_dim)),
            -self.log_decay.float().exp() * F.softplus(a_BTH.float() + self.step_bias.float()),
            b_BTH.float().sigmoid(),
            state_BHKV=carried.get("matrix"),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        gate_BTHV = F.silu(z_BTD.float()).unflatten(-1, (c.heads, self.value_dim))
        y_BTHV = (self.norm(y_BTHV).float() * gate_BTHV).to(x_BTD.dtype)
        return self.wo(y_BTHV.flatten(2)), None if state is None else {"conv": tail, "matrix": matrix}
