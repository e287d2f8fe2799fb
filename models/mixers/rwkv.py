"""RWKV-4 time mix: attention by what a key says and how long ago it was, as a recurrence per channel.

    y_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same sum without v);  out = W_o (sig(r) y)
    r, k, v = W (mu x_t + (1 - mu) x_{t-1}),  w = -exp(log_decay)

arXiv 2305.13048. The sums are carried over their largest exponent, so that no key overflows. Starting values as in the
authors' code but for the matrices, which the decoder draws. Its ffn is `channel_mix(receptance=True)`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from models.layers.shift import previous
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful

EMPTY = -1e30  # the largest exponent of no tokens: as good as -inf


class RWKV(Stateful):
    family = "attention"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """hidden: channels of the recurrence, 0 means dim."""

        hidden: int = 0

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        dim, hidden = place.dim, config.hidden or place.dim
        deep, rest = place.layer / max(1, place.layers - 1), 1 - place.layer / place.layers
        channel, line = torch.arange(dim) / dim, torch.linspace(0, 1, hidden)
        curves = [channel**rest, channel**rest + 0.3 * deep, channel ** (0.5 * rest)]
        self.mix = nn.Parameter(torch.stack(curves))  # of k, v, r: the share of the token itself
        self.log_decay = nn.Parameter(-5 + 8 * line ** (0.7 + 1.3 * deep))
        self.bonus = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(hidden) + 1) % 3 - 1))
        self.wk, self.wv, self.wr = (nn.Linear(dim, hidden, bias=False) for _ in range(3))
        self.wo = nn.Linear(hidden, dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        hidden, dim = self.wk.weight.shape
        return {
            "shift": TensorSpec((dim,), self.wo.weight.dtype),
            "sums": TensorSpec((2, hidden), torch.float32),
            "largest": TensorSpec((1, hidden), torch.float32, fill=EMPTY),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        before_BTD, tail = previous(x_BTD, at, None if state is None else state["shift"])
        k_in, v_in, r_in = (torch.lerp(before_BTD, x_BTD, mix_D) for mix_D in self.mix.unbind(0))
        y_BTD, moments = kernels.wkv4(
            self.wk(k_in).float(),
            self.wv(v_in),
            -self.log_decay.float().exp(),
            self.bonus.float(),
            state_B3D=None if state is None else torch.cat([state["sums"], state["largest"]], 1),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        y_BTD = self.wo(self.wr(r_in).sigmoid() * y_BTD)
        if state is None:
            return y_BTD, None
        sums, largest = moments.split([2, 1], -2)
        return y_BTD, {"shift": tail, "sums": sums, "largest": largest}
