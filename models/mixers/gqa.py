"""Grouped-query attention: G query heads share one key-value head, so the cache shrinks by G.

    y_t = W_o softmax_j(q_t . k_j / sqrt(K)) v_j,   j <= t   (and j > t - window)

arXiv 2305.13245 (GQA), 2104.09864 (RoPE), 2302.05442 (QK-norm). heads = kv_heads is multi-head attention. Differs from
the paper: rotary positions; optional window and per-head RMSNorm of queries and keys.
"""

from dataclasses import dataclass

from torch import Tensor, nn

import kernels
from models.layers.norm import RMSNorm
from models.layers.rope import rotate
from models.span import Span
from models.state import State, TensorSpec, append
from models.stateful import Place, Stateful


class GQA(Stateful):
    family = "attention"
    keeps = True  # nothing of fixed size to keep

    @dataclass(frozen=True)
    class Config:
        """head_dim: 0 means dim / heads. window: tokens seen, 0 for all. theta: base of the rotary frequencies."""

        heads: int = 4
        kv_heads: int = 2
        head_dim: int = 0
        window: int = 0
        theta: float = 10000.0
        qk_norm: bool = False

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        if config.heads % config.kv_heads:
            raise ValueError(f"gqa: heads={config.heads} must be a multiple of kv_heads={config.kv_heads}")
        if not config.head_dim and place.dim % config.heads:
            raise ValueError(f"gqa: dim={place.dim} must be a multiple of heads={config.heads}, or give head_dim")
        self.config = config
        self.head_dim = config.head_dim or place.dim // config.heads
        if self.head_dim % 2:
            raise ValueError(f"gqa: head_dim={self.head_dim} must be even for rotary positions")
        self.wqkv = nn.Linear(place.dim, (config.heads + 2 * config.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.heads * self.head_dim, place.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, 1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, 1e-6) if config.qk_norm else nn.Identity()

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        shape, dtype = (self.config.kv_heads, self.head_dim), self.wo.weight.dtype
        spec = TensorSpec(shape, dtype, every=1, window=self.config.window)
        return {"k": spec, "v": spec}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.config
        heads_BTHK = self.wqkv(x_BTD).unflatten(-1, (c.heads + 2 * c.kv_heads, self.head_dim))
        q_BTHK, k_BTGK, v_BTGK = heads_BTHK.split([c.heads, c.kv_heads, c.kv_heads], 2)
        q_BTHK = rotate(self.q_norm(q_BTHK), at.positions_BT, c.theta)
        k_BTGK = rotate(self.k_norm(k_BTGK), at.positions_BT, c.theta)
        view, state = append(state, at, k=k_BTGK, v=v_BTGK)
        y_BTHK = kernels.attention(q_BTHK, view, window=c.window)
        return self.wo(y_BTHK.flatten(2)), state
