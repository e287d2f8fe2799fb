"""Based: linear attention whose features are the Taylor series of exp recalls the far past; a small window is exact.

    f(x) = (1, x, x x^T / sqrt(2)),  x = q or k over K^(1/4):   f(q) . f(k) = 1 + s + s^2 / 2,   s = q . k / sqrt(K)
    y_t = sum f(q_t) . f(k_j) v_j / sum f(q_t) . f(k_j);   w_t = softmax attention over the last `window` tokens
    out = W_o [y, w]

arXiv 2402.18668. Keys are narrow, since the state has K + K (K + 1) / 2 + 1 rows. Differs from the paper: both kinds of
attention stand side by side in every layer, with queries, keys and values of their own, and not in layers by turns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from models.config import at_least, parse_part
from models.layers.matrix_memory import MatrixMemory
from models.span import Span
from models.state import State, TensorSpec, append
from models.stateful import Place


class Based(MatrixMemory):
    @dataclass(frozen=True)
    class Config:
        """heads: of either attention. key_dim: of linear attention. window: tokens seen by the other, itself included.

        positions: a scheme of models/positions, for the window.
        """

        heads: int = 4
        key_dim: int = 16
        window: int = 64
        positions: str = "rope"

        @classmethod
        def tiny(cls) -> "Based.Config":
            return cls(key_dim=8, window=8)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        at_least(config, key_dim=1, window=1)
        keys, products = config.heads * config.key_dim, config.key_dim * (config.key_dim + 1) // 2
        self.size = (config.heads, 1 + config.key_dim + products, self.head_dim + 1)  # the last column sums the keys
        positions, positions_config = parse_part(config.positions, "position")
        self.positions = positions(positions_config, self.head_dim, config.heads, place)
        self.widths = [keys, keys, *[place.dim] * 4]  # q, k, v of linear attention and of the window
        self.wi = nn.Linear(place.dim, sum(self.widths), bias=False)
        self.wo = nn.Linear(2 * place.dim, place.dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        recent = TensorSpec((self.heads, self.head_dim), self.wo.weight.dtype, every=1, window=self.config.window)
        return super().state_spec(max_len) | {"k": recent, "v": recent}

    def features(self, x_BTHK: Tensor) -> Tensor:
        """(B, T, H, features), fp32 at least. A product of two channels comes once, for both of its orders."""
        x_BTHK = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32)) * self.config.key_dim**-0.25
        one, two = torch.triu_indices(self.config.key_dim, self.config.key_dim, device=x_BTHK.device)
        weight = torch.where(one == two, 0.5, 1.0).sqrt()
        products = x_BTHK.index_select(-1, one) * x_BTHK.index_select(-1, two) * weight
        return torch.cat([torch.ones_like(x_BTHK[..., :1]), x_BTHK, products], -1)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        parts = map(self.by_head, self.wi(x_BTD).split(self.widths, -1))
        far_q_BTHK, far_k_BTHK, far_v_BTHV, q_BTHK, k_BTHK, v_BTHV = parts
        far = self.features(far_q_BTHK), self.features(far_k_BTHK), far_v_BTHV
        y_BTHV, memory = self.remember(*far, None, at, state, normalize=True)
        q_BTHK, k_BTHK = self.positions.query(q_BTHK, at), self.positions.key(k_BTHK, at)
        view, recent = append(state, at, k=k_BTHK, v=v_BTHV)
        w_BTHV = kernels.attention(q_BTHK, view, window=self.config.window, slopes_H=self.positions.slopes_H)
        return self.wo(torch.cat([y_BTHV, w_BTHV], -1).flatten(2)), None if state is None else memory | recent
