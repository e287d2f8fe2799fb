"""Hawk: a recurrence of one number per channel whose gates depend on the input (the RG-LRU), inside a gated block.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t);  out = W_o (gelu(W_y x_t) h_t),   u = conv(W_x x)
    log a_t = -8 sig(W_a u_t) softplus(decay),  i_t = sig(W_i u_t);   W_a, W_i block-diagonal

arXiv 2402.19427. As in RecurrentGemma the first token of a document is not scaled by sqrt(1 - a^2), gelu is its tanh
form, and the gradient of the root is bounded: here the root is a line of slope 2000 below 2.5e-7.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.config import at_least
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful

SHARPNESS = 8.0
NEAR = 2.5e-7  # below it the root is a line


class Hawk(Stateful):
    family = "attention"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """width: channels of the recurrence, 0 means dim. heads: blocks of the gates' matrices. conv: taps."""

        width: int = 0
        heads: int = 4
        conv: int = 4

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1, conv=2)
        self.width = width = config.width or place.dim
        if width % config.heads:
            raise ValueError(f"hawk: width={width} must be a multiple of heads={config.heads}")
        block = width // config.heads
        self.wi = nn.Linear(place.dim, 2 * width)  # y x
        self.conv = nn.Parameter(torch.randn(width, config.conv) * config.conv**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(width))
        self.gates = nn.Parameter(torch.randn(2, config.heads, block, block) * block**-0.5)  # i a
        self.gate_bias = nn.Parameter(torch.zeros(2, config.heads, block))
        # a = exp(-8 softplus(decay)) ^ gate; with the gate fully open a^(1/8) starts uniform in area on (0.9, 0.999).
        radius = torch.empty(width).uniform_(0.9**2, 0.999**2).sqrt()
        self.decay = nn.Parameter((-radius.log()).expm1().log())
        self.wo = nn.Linear(width, place.dim)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        width, taps = self.conv.shape
        return {
            "conv": TensorSpec((taps - 1, width), self.wo.weight.dtype),
            "hidden": TensorSpec((width,), torch.float32),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        carried = state or {}
        y_BTD, u_BTD = self.wi(x_BTD).chunk(2, -1)
        u_BTD, tail = kernels.conv1d(
            u_BTD, self.conv, self.conv_bias, state_BWD=carried.get("conv"), segments_BT=at.segments_BT, keep=at.keep
        )
        u_BTHW = u_BTD.unflatten(-1, self.gate_bias.shape[1:])
        gates = torch.einsum("bthw,ghwv->gbthv", u_BTHW, self.gates).float() + self.gate_bias[:, None, None].float()
        input_BTD, decay_BTD = gates.sigmoid().flatten(-2)
        log_a_BTD = -SHARPNESS * decay_BTD * F.softplus(self.decay.float())
        scale_BTD = _root(-torch.expm1(2 * log_a_BTD)).masked_fill((at.positions_BT == 0)[..., None], 1.0)
        h_BTD, hidden = kernels.diagonal_scan(
            log_a_BTD.exp(),
            u_BTD * input_BTD * scale_BTD,
            state=carried.get("hidden"),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        y_BTD = F.gelu(y_BTD, approximate="tanh") * h_BTD.to(x_BTD.dtype)
        return self.wo(y_BTD), None if state is None else {"conv": tail, "hidden": hidden}


def _root(x: Tensor) -> Tensor:
    """sqrt with a bounded gradient."""
    return torch.where(x > NEAR, x.clamp(min=NEAR).sqrt(), x * NEAR**-0.5)
