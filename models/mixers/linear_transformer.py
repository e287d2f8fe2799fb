"""Linear transformer: attention whose softmax is a dot product of features, so the past sums up to a matrix.

    S_t = S_{t-1} + f(k_t) v_t^T;  z_t = z_{t-1} + f(k_t);  y_t = S_t^T f(q_t) / (z_t . f(q_t)),   f(x) = elu(x) + 1

arXiv 2006.16236. Features are positive, so the weights of the past are, and add up to one. No positions, as in the
paper's layer; other feature maps subclass this one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.matrix_memory import MatrixMemory
from models.span import Span
from models.state import State
from models.stateful import Place


class LinearTransformer(MatrixMemory):
    @dataclass(frozen=True)
    class Config:
        """heads: of dim / heads channels."""

        heads: int = 4

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.size = (config.heads, self.head_dim, self.head_dim + 1)  # the last column sums the keys
        self.wqkv = nn.Linear(place.dim, 3 * place.dim, bias=False)
        self.wo = nn.Linear(place.dim, place.dim, bias=False)

    def features(self, q_BTHK: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Those of queries and keys, (B, T, H, features), fp32 at least."""
        wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        return F.elu(q_BTHK.to(wide)) + 1, F.elu(k_BTHK.to(wide)) + 1

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        q_BTHK, k_BTHK, v_BTHV = map(self.by_head, self.wqkv(x_BTD).chunk(3, -1))
        features = self.features(q_BTHK, k_BTHK)
        y_BTHV, state = self.remember(*features, v_BTHV, None, at, state, normalize=True)
        return self.wo(y_BTHV.flatten(2)), state
