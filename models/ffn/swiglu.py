"""SwiGLU: a feed-forward layer whose hidden units are gated, y = W_o (silu(W_g x) * W_u x).

arXiv 2002.05202. The two input projections are one matrix. Other activations make the paper's GEGLU and its kin; a norm
before the last projection keeps its inputs small, as in 2504.12285 (BitNet b1.58).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import kernels
from models.layers.activation import activate
from models.layers.norm import RMSNorm
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class SwiGLU(Stateful):
    family = "feedforward"

    @dataclass(frozen=True)
    class Config:
        """hidden: gated units, 0 means 8/3 dim rounded up to a multiple of 16 (the parameters of a 4 dim MLP).

        activation: of the gate. hidden_norm: RMSNorm of the hidden units.
        """

        hidden: int = 0
        bias: bool = False
        activation: Literal["silu", "gelu", "gelu_tanh", "relu2"] = "silu"
        hidden_norm: bool = False

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden or -(-place.dim * 8 // 3 // 16) * 16
        self.wi = nn.Linear(place.dim, 2 * hidden, bias=config.bias)
        self.wo = nn.Linear(hidden, place.dim, bias=config.bias)
        self.hidden_norm = RMSNorm(hidden, place.eps) if config.hidden_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        gate, up = self.wi(x_BTD).chunk(2, -1)
        # One pass, where a pass is what counts; the compiler makes one of its own, and cannot ask for the mode.
        if self.config.activation == "silu" and not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            hidden = kernels.swiglu(gate, up)
        else:
            hidden = activate(gate, self.config.activation) * up
        return self.wo(self.hidden_norm(hidden)), state
