"""Grouped-query attention: G query heads share one key-value head, so the cache shrinks by G.

    y_t = W_o softmax_j(q_t . k_j / sqrt(K)) v_j,   j <= t   (and j > t - window)

arXiv 2305.13245 (GQA), 2104.09864 (RoPE), 2302.05442 (QK-norm). heads = kv_heads is multi-head attention. Differs from
the paper: rotary positions; optional window and per-head RMSNorm of queries and keys.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

import kernels
from models.config import at_least, parse_part
from models.layers.norm import RMSNorm
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful


class GQA(Stateful):
    family = "attention"
    keeps = trees = True  # nothing of fixed size to keep, where the cache has nothing

    @dataclass(frozen=True)
    class Config:
        """head_dim: 0 means dim / heads. window: tokens seen, 0 for all. scale: of the scores, 0 means head_dim^-0.5.

        positions, scores, cache: a scheme of models/positions, models/scores, models/caches. mask: full lets every
        token see every other, for encoders. qk_norm: RMSNorm of each head's queries and keys. bias: on the projections
        to q, k and v; out_bias: on the one back; out_norm: RMSNorm of what that reads.
        """

        heads: int = 4
        kv_heads: int = 2
        head_dim: int = 0
        window: int = 0
        scale: float = 0.0
        positions: str = "rope"
        scores: str = "softmax"
        mask: Literal["causal", "full"] = "causal"
        qk_norm: bool = False
        bias: bool = False
        out_bias: bool = False
        out_norm: bool = False
        cache: str = "full"

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1, kv_heads=1)
        if config.heads % config.kv_heads:
            raise ValueError(f"gqa: heads={config.heads} must be a multiple of kv_heads={config.kv_heads}")
        if not config.head_dim and place.dim % config.heads:
            raise ValueError(f"gqa: dim={place.dim} must be a multiple of heads={config.heads}, or give head_dim")
        self.config = config
        self.head_dim = config.head_dim or place.dim // config.heads
        positions, positions_config = parse_part(config.positions, "position")
        scores, scores_config = parse_part(config.scores, "score")
        self.positions = positions(positions_config, self.head_dim, config.heads, place)
        self.scores = scores(scores_config, config.heads, place)
        cache, cache_config = parse_part(config.cache, "cache")
        self.cache = cache(cache_config, config.kv_heads, self.head_dim, config.scale or self.head_dim**-0.5)
        self.keeps, self.trees = self.keeps and self.cache.keeps, self.trees and self.cache.trees
        self.causal = config.mask == "causal"
        self.wqkv = nn.Linear(place.dim, (config.heads + 2 * config.kv_heads) * self.head_dim, bias=config.bias)
        self.wo = nn.Linear(config.heads * self.head_dim, place.dim, bias=config.out_bias)
        self.q_norm = RMSNorm(self.head_dim, place.eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, place.eps) if config.qk_norm else nn.Identity()
        self.out_norm = RMSNorm(self.wo.in_features, place.eps) if config.out_norm else nn.Identity()

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        return self.cache.state_spec(self.wo.weight.dtype, self.config.window)

    def project(self, x_BTD: Tensor, at: Span) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values (B, T, G, K), normed and told their places."""
        c = self.config
        heads_BTHK = self.wqkv(x_BTD).unflatten(-1, (c.heads + 2 * c.kv_heads, self.head_dim))
        q_BTHK, k_BTGK, v_BTGK = heads_BTHK.split([c.heads, c.kv_heads, c.kv_heads], 2)
        q_BTHK = self.positions.query(self.q_norm(q_BTHK), at)
        return q_BTHK, self.positions.key(self.k_norm(k_BTGK), at), v_BTGK

    def attend(self, q_BTHK: Tensor, view: kernels.View) -> Tensor:
        """Weighted values (B, T, H, K) of what the view shows."""
        c = self.config
        options = {"window": c.window, "mask": c.mask, "slopes_H": self.positions.slopes_H}
        return self.scores(q_BTHK, view, scale=c.scale or None, **options)

    def read(self, x_BTD: Tensor, at: Span, state: State | None) -> tuple[Tensor, State | None]:
        """Weighted values (B, T, H, K) of what the tokens may read, and the state after."""
        return self.cache(self.attend, *self.project(x_BTD, at), at, state)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        y_BTHK, state = self.read(x_BTD, at, state)
        return self.wo(self.out_norm(y_BTHK.flatten(2))), state
