"""Normalisation over time: by the mean and variance of all that a document has said so far, in groups of channels.

    y_t = (x_t - m_t) / sqrt(s_t + eps) * weight + bias;   m_t, s_t over tokens 1..t and a group's channels

arXiv 2404.08801 (Megalodon), a group norm that a language model may use. The first tokens lean on a learnt prior, which
counts as one token. Both statistics are means that move by 1/n, so no sum grows and no large numbers are subtracted.
"""

import torch
from torch import Tensor, nn

import kernels
from models.span import Span
from models.state import TensorSpec


class TimestepNorm(nn.Module):
    def __init__(self, dim: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.prior_mean, self.prior_log_var = (nn.Parameter(torch.zeros(groups)) for _ in range(2))

    @property
    def spec(self) -> TensorSpec:
        """Of mean and variance without the prior's share, (2, groups)."""
        return TensorSpec((2, self.groups), torch.float32)

    def forward(self, x_BTD: Tensor, at: Span, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """y in x's dtype, and the statistics after: (B, 2, G), with keep (B, keep+1, 2, G)."""
        x_BTGC = (x_BTD.float() if x_BTD.dtype.itemsize < 4 else x_BTD).unflatten(-1, (self.groups, -1))
        n_BT1 = (at.positions_BT + 2).to(x_BTGC.dtype)[..., None]  # the prior, the tokens before and this one
        old_BTG = ((n_BT1 - 1) / n_BT1).expand(*x_BTD.shape[:2], self.groups)
        here_BTG = x_BTGC.mean(-1)

        def average(x_BTG: Tensor, index: int, prior_G: Tensor) -> tuple[Tensor, Tensor]:
            carried = None if state is None else state[:, index]
            h_BTG, after = kernels.diagonal_scan(
                old_BTG, x_BTG / n_BT1, state=carried, segments_BT=at.segments_BT, keep=at.keep
            )
            return h_BTG + prior_G.to(h_BTG.dtype) / n_BT1, after

        mean_BTG, mean = average(here_BTG, 0, self.prior_mean)
        # Around the mean as it was before the token, which is farther from it by n / (n - 1).
        spread_BTG = x_BTGC.var(-1, correction=0) + (here_BTG - mean_BTG).square() * n_BT1 / (n_BT1 - 1)
        var_BTG, var = average(spread_BTG, 1, self.prior_log_var.exp())
        y_BTGC = (x_BTGC - mean_BTG[..., None]) * (var_BTG + self.eps).rsqrt()[..., None]
        y_BTD = y_BTGC.flatten(2) * self.weight + self.bias
        return y_BTD.to(x_BTD.dtype), torch.stack([mean, var], -2)
