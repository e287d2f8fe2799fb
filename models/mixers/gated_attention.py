"""Gated attention: what a head has read passes a sigmoid gate of the token that asked, before it is written.

    y_t = W_o [sig(W_g x_t) * softmax_j(q_t . k_j / sqrt(K)) v_j]

arXiv 2505.06708. A nonlinearity between values and W_o, and a way to read nothing, so no token must serve as a sink.
With `qk_norm=True` and `positions=rope(fraction=0.25)` the full-attention layers of Qwen3-Next.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models.mixers.gqa import GQA
from models.span import Span
from models.state import State
from models.stateful import Place


class GatedAttention(GQA):
    @dataclass(frozen=True)
    class Config(GQA.Config):
        """gate: one for each channel of a head, or one for each head."""

        gate: Literal["channel", "head"] = "channel"

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width = config.heads * (self.head_dim if config.gate == "channel" else 1)
        self.wg = nn.Linear(place.dim, width, bias=config.bias)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        y_BTHK, state = self.read(x_BTD, at, state)
        gate_BTH = self.wg(x_BTD).sigmoid().unflatten(-1, (self.config.heads, -1))
        return self.wo(self.out_norm((gate_BTH * y_BTHK).flatten(2))), state
