"""Retention: linear attention in which each head forgets at its own fixed rate, so heads see several scales of time.

    S_t = g_h S_{t-1} + k_t v_t^T;  y_t = S_t^T q_t / sqrt(K),   g_h = 1 - 2^(-5-h)
    q, k turned by their positions (xPos);  out = W_o (RMSNorm_h(y) silu(W_g x))

arXiv 2307.08621. The exponential half of xPos cancels into the decay, so its rotary half is all there is to compute;
`positions` gives its frequencies. The group norm has no mean and no weights, as in the authors' code. The scores are
not normalised, which the norm of each head would cancel; retnet_v2 does that instead of the norm.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.config import at_least, parse_part
from models.layers.matrix_memory import MatrixMemory
from models.registry import name_of
from models.span import Span
from models.state import State
from models.stateful import Place


class RetNet(MatrixMemory):
    @dataclass(frozen=True)
    class Config:
        """expand: width of all values together, in dims. positions: a scheme of models/positions."""

        heads: int = 4
        expand: int = 2
        positions: str = "rope"

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        at_least(config, expand=1)
        values = config.expand * place.dim
        self.size = (config.heads, self.head_dim, config.expand * self.head_dim)
        positions, positions_config = parse_part(config.positions, "position")
        self.positions = positions(positions_config, self.head_dim, config.heads, place)
        if self.positions.slopes_H is not None:  # retention's own decay is such a bias
            raise ValueError(
                f"{name_of(type(self))}.positions={config.positions!r}: no bias by distance; take rope or nope"
            )
        self.widths = [place.dim, place.dim, values, values]  # q, k, v, gate
        self.wi = nn.Linear(place.dim, sum(self.widths), bias=False)
        self.wo = nn.Linear(values, place.dim, bias=False)

    def decay(self, device: torch.device) -> Tensor:
        """log g of each head, fp32: computed at each call, as a buffer cast to bf16 would be rounded to no decay."""
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(self.heads, device=device, dtype=torch.float32)))

    def retain(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, at: Span, state: State | None
    ) -> tuple[Tensor, State | None]:
        """What each head gives, of size one whatever its decay, and the state after."""
        decay_BTH = self.decay(q_BTHK.device).expand(*q_BTHK.shape[:3])
        y_BTHV, state = self.remember(q_BTHK, k_BTHK, v_BTHV, decay_BTH, at, state, scale=self.head_dim**-0.5)
        return kernels.rms_norm(y_BTHV, eps=1e-6), state

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        q_BTHK, k_BTHK, v_BTHV, gate_BTHV = map(self.by_head, self.wi(x_BTD).split(self.widths, -1))
        q_BTHK, k_BTHK = self.positions.query(q_BTHK, at), self.positions.key(k_BTHK, at)
        y_BTHV, state = self.retain(q_BTHK, k_BTHK, v_BTHV, at, state)
        return self.wo((y_BTHV * F.silu(gate_BTHV)).flatten(2)), state
