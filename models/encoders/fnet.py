"""FNet: tokens are mixed by a Fourier transform over time and channels, which has no parameters and costs T log T.

    h = norm(x + Re(F_time(F_channels(x))));   y = norm(h + MLP(h))

arXiv 2105.03824. A document shorter than its row is transformed at its own length, by Bluestein's chirps. Differs from
the paper as `models.encoder` says.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.encoder import Encoder
from models.layers.mlp import Activation
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class FNet(Encoder):
    @dataclass(frozen=True)
    class Config(Encoder.Config):
        """As of every encoder."""

        activation: Activation = "gelu_tanh"

    def build(self) -> None:
        super().build()
        self.project = nn.Linear(self.config.dim, self.config.dim)

    def mixer(self, place: Place) -> Stateful:
        return Fourier(Stateful.Config(), place)

    def embed(self, ids_BT: Tensor, at: Span) -> Tensor:
        return self.project(super().embed(ids_BT, at))


class Fourier(Stateful):
    """The real part of the transform of each document over time and channels, in fp32."""

    family = "attention"
    causal = False

    def __init__(self, config: Stateful.Config, place: Place) -> None:
        super().__init__()
        self.config = config

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        x = torch.fft.fft(x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32)), dim=2)
        x = torch.fft.fft(x, dim=1) if at.segments_BT is None else chirped(x, at.segments_BT >= 0)
        return x.real.to(x_BTD.dtype), state


def chirped(x_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """The Fourier transform over time of complex rows that end at lengths of their own, 0 behind their ends.

    With t s = (t^2 + s^2 - (t - s)^2) / 2 it is a convolution with a chirp of the row's length L, exp(i pi t^2 / L).
    """
    tokens = x_BTD.shape[1]
    count_B1, columns_T = real_BT.sum(1, keepdim=True).clamp(min=1), torch.arange(tokens, device=x_BTD.device)
    turn_BT = columns_T.square() % (2 * count_B1)  # whole turns are taken off while numbers are exact
    angle_BT = turn_BT.double() * torch.pi / count_B1
    chirp_BT = torch.polar(torch.ones_like(angle_BT), angle_BT).to(x_BTD.dtype)
    chirp_BT1, real_BT1 = chirp_BT[..., None], real_BT[..., None]
    around_BU = torch.cat([chirp_BT, chirp_BT[:, 1:].flip(1)], 1)  # chirps of 0, 1, .., T-1, -(T-1), .., -1
    size = around_BU.shape[1]
    spectrum = torch.fft.fft(x_BTD * (chirp_BT1.conj() * real_BT1), n=size, dim=1)
    y_BTD = torch.fft.ifft(spectrum * torch.fft.fft(around_BU, dim=1)[..., None], dim=1)[:, :tokens]
    return y_BTD * (chirp_BT1.conj() * real_BT1)
