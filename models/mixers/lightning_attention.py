"""Lightning attention: linear attention with a fixed decay per head, slower in higher layers; fast because it is tiled.

    S_t = e^(-s) S_{t-1} + k_t v_t^T;  y_t = S_t^T q_t;   q, k, v = silu(W x)
    s = 2^(-8 (h+1) / H) (1 - l / (L - 1));  out = W_o (RMSNorm(y) sigmoid(W_g x))

arXiv 2401.04658, 2501.08313 (MiniMax-01, whose layer this is). Within a tile the kernel attends, between tiles it
carries S, so the cost grows with the length and not with its square. The norm runs over all heads; no scale and no
denominator.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.matrix_memory import MatrixMemory
from models.layers.norm import RMSNorm
from models.span import Span
from models.state import State
from models.stateful import Place


class LightningAttention(MatrixMemory):
    @dataclass(frozen=True)
    class Config:
        """heads: of head_dim channels, 0 means dim / heads."""

        heads: int = 4
        head_dim: int = 0

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.head_dim = config.head_dim or self.head_dim
        self.size = (config.heads, self.head_dim, self.head_dim)
        inner = config.heads * self.head_dim
        self.share = 1 - place.layer / (place.layers - 1 + 1e-5) + 1e-5  # of the slopes, in this layer
        self.wqkv = nn.Linear(place.dim, 3 * inner, bias=False)  # head by head, as in the released checkpoints
        self.wg = nn.Linear(place.dim, inner, bias=False)
        self.norm = RMSNorm(inner, 1e-6)
        self.wo = nn.Linear(inner, place.dim, bias=False)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        q_BTHK, k_BTHK, v_BTHV = self.by_head(F.silu(self.wqkv(x_BTD))).chunk(3, -1)
        head_H = torch.arange(1, self.heads + 1, device=x_BTD.device, dtype=torch.float32)
        slope_H = torch.exp2(-8 / self.heads * head_H) * self.share
        y_BTHV, state = self.remember(q_BTHK, k_BTHK, v_BTHV, (-slope_H).expand(*q_BTHK.shape[:3]), at, state)
        return self.wo(self.norm(y_BTHV.flatten(2)) * self.wg(x_BTD).sigmoid()), state
