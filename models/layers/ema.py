"""Moving averages over time, several to a channel, each with its own weight, damping and, if they turn, phase.

    h_t = a x_t + q h_{t-1}  for each of N averages;  y_t = Re(sum_n g_n h_{t,n}) / sqrt(N) + w x_t
    a = sig(alpha),  q = 1 - a sig(delta)  [times e^(i n theta),  theta = 2 pi sig(.) / N,  n = 1..N]

arXiv 2209.10655 (Mega), with the brackets 2404.08801 (Megalodon). A convolution with K_j = Re(sum_n g_n a_n q_n^j) /
sqrt(N), computed as the recurrence it is. Mega's weights on the input and on the output act as a product: g is one.
"""

import math

import torch
from torch import Tensor, nn

import kernels
from models.span import Span
from models.state import TensorSpec


class EMA(nn.Module):
    """`size` averages for each of `dim` channels; `turning` ones are complex."""

    def __init__(self, dim: int, size: int, turning: bool = False) -> None:
        super().__init__()
        self.size, self.turning = size, turning
        self.alpha, self.delta = (nn.Parameter(torch.randn(dim, size) * 0.2) for _ in range(2))
        self.gain = nn.Parameter(torch.randn(2 if turning else 1, dim, size))
        self.skip = nn.Parameter(torch.randn(dim) * (0.25 if turning else 1.0))
        if turning:
            nn.init.zeros_(self.gain[1])
            share = (dim + 1) ** (-torch.arange(1, dim + 1) / dim)  # of the turns a channel can make, all scales alike
            self.theta = nn.Parameter(share.logit())

    @property
    def spec(self) -> TensorSpec:
        """Of the averages after a token, real and imaginary parts apart."""
        return TensorSpec((*self.alpha.shape, 2) if self.turning else tuple(self.alpha.shape), torch.float32)

    def weights(self) -> tuple[Tensor, Tensor]:
        """a and q of each average, (D, N), fp32 at least; q complex if they turn."""
        alpha, delta = (x.float() if x.dtype.itemsize < 4 else x for x in (self.alpha, self.delta))
        weight = alpha.sigmoid()
        keep = 1 - weight * delta.sigmoid()
        if self.turning:
            counts = torch.arange(1, self.size + 1, device=keep.device, dtype=keep.dtype)
            angle = (2 * math.pi / self.size) * self.theta.to(keep.dtype).sigmoid()[:, None] * counts
            keep = torch.polar(keep, angle)
        return weight, keep

    def forward(self, x_BTD: Tensor, at: Span, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """y (B, T, D) in x's dtype, and the averages after: `spec` of each row, with keep (B, keep+1, ...)."""
        weight_DN, keep_DN = self.weights()
        x32_BTD = x_BTD.to(weight_DN.dtype)
        inputs_BTDN = (x32_BTD[..., None] * weight_DN).to(keep_DN.dtype)
        if self.turning and state is not None:
            state = torch.view_as_complex(state.contiguous())
        h_BTDN, after = kernels.diagonal_scan(
            keep_DN, inputs_BTDN, state=state, segments_BT=at.segments_BT, keep=at.keep
        )
        gain = self.gain.to(weight_DN.dtype) * self.size**-0.5
        if self.turning:
            gain = torch.stack([gain[0], -gain[1]])  # Re(g h), without the other half of a complex product
            y_BTD = torch.einsum("btdnc,cdn->btd", torch.view_as_real(h_BTDN), gain)
            after = torch.view_as_real(after)
        else:
            y_BTD = torch.einsum("btdn,dn->btd", h_BTDN, gain[0])
        return (y_BTD + self.skip * x32_BTD).to(x_BTD.dtype), after
