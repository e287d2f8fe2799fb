"""Gated DeltaNet: a matrix memory that decays by a gate and corrects what a key already retrieves (the delta rule).

    S_t = exp(g_t) S_{t-1};  S_t += b_t k_t (v_t - S_t^T k_t)^T;  y_t = S_t^T q_t / sqrt(K)
    g_t = -exp(A) softplus(a_t + dt),  b_t = sigmoid(.),  out = W_o (RMSNorm(y) silu(z))

arXiv 2412.06464. q, k, v pass a short causal convolution with SiLU; q and k are L2-normalised. Fewer key than value
heads are allowed, as in Qwen3-Next: key head i serves the value heads of its group.
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


class GatedDeltaNet(DeltaMemory):
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
        self.log_decay = nn.Parameter(draw_log_decay(config.heads))
        self.step_bias = nn.Parameter(draw_step_bias(config.heads))
        self.remember_in((config.heads, self.key_dim, self.value_dim), self.widths[0], config.conv, place)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.config
        qkv_BTD, z_BTD, b_BTH, a_BTH = self.wi(x_BTD).split(self.widths, -1)
        qkv_BTD, tail = self.convolved(qkv_BTD, at, state)
        keys, group = c.key_heads * self.key_dim, c.heads // c.key_heads
        q_BTD, k_BTD, v_BTD = qkv_BTD.split([keys, keys, c.heads * self.value_dim], -1)
        q_BTGK, k_BTGK = (unit(x.unflatten(-1, (c.key_heads, self.key_dim))) for x in (q_BTD, k_BTD))
        q_BTHK, k_BTHK = (x.repeat_interleave(group, 2) for x in (q_BTGK, k_BTGK))
        v_BTHV, gate_BTHV = (x.unflatten(-1, (c.heads, self.value_dim)) for x in (v_BTD, F.silu(z_BTD.float())))
        decay_BTH = -self.log_decay.float().exp() * F.softplus(a_BTH.float() + self.step_bias.float())
        y_BTHV, matrix = self.corrected(q_BTHK, k_BTHK, v_BTHV, decay_BTH, b_BTH.float().sigmoid(), at, state)
        return self.told(y_BTHV, gate_BTHV, x_BTD.dtype), None if state is None else {"conv": tail, "matrix": matrix}
