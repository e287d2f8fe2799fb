"""Many small feed-forward networks of one shape, of which each token passes a few.

Rows are sorted by expert, so that each expert is one product over all its tokens and no row is padded.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.layers.activation import activate

Activation = Literal["swiglu", "geglu", "relu", "relu2"]


GATES = {"swiglu": "silu", "geglu": "gelu"}  # gated kinds, which need two numbers for each hidden unit


def units(h: Tensor, activation: Activation) -> Tensor:
    """Hidden units of what the first projection gives, gates first."""
    if activation not in GATES:
        return activate(h, activation)
    gate, up = h.chunk(2, -1)
    return activate(gate, GATES[activation]) * up


def inner(hidden: int, activation: Activation) -> int:
    """Width of the first projection."""
    return 2 * hidden if activation in GATES else hidden


class Dense(nn.Module):
    """One such network, which every token passes."""

    def __init__(self, dim: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.wi = nn.Linear(dim, inner(hidden, activation), bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(units(self.wi(x), self.activation))


class Experts(nn.Module):
    """`count` networks: wi (E, D, F or 2 F) and wo (E, F, D), drawn as a decoder draws its linear weights.

    layers: of the stack, whose residual branches wo shares the variance with; 0: it does not write to the stream.
    """

    def __init__(self, dim: int, hidden: int, count: int, activation: Activation, layers: int) -> None:
        super().__init__()
        self.activation, self.count = activation, count
        self.wi = nn.Parameter(torch.randn(count, dim, inner(hidden, activation)) * dim**-0.5)
        self.wo = nn.Parameter(torch.randn(count, hidden, dim) * (hidden * max(2 * layers, 1)) ** -0.5)

    def products(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """y (M, D): the first counts[0] rows through expert 0, the next counts[1] through expert 1, and so on."""
        h_MF = kernels.grouped_matmul(x_MD.to(self.wi.dtype), self.wi, counts_E)
        return kernels.grouped_matmul(units(h_MF, self.activation), self.wo, counts_E)

    def forward(
        self, x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor, *, some: bool = False, weigh_input: bool = False
    ) -> Tensor:
        """The weighted sum of what its experts make of each token, (N, D) in the dtype of x.

        some: an expert may be `count`, which is none: it adds nothing and costs nothing. weigh_input: weights go to
        what experts read, not to what they give.
        """
        k = experts_Nk.shape[1]
        order_M, counts_E = kernels.dispatch(experts_Nk, self.count + some)
        rows = len(order_M)
        if some:
            weights_Nk = weights_Nk * (experts_Nk < self.count)
            if torch.compiler.is_compiling():  # a graph has one shape: the last expert also reads what nobody wants
                last = counts_E[-2:].sum(0, keepdim=True)
                counts_E = torch.cat([counts_E[:-2], last])
            else:
                rows, counts_E = rows - int(counts_E[-1]), counts_E[:-1]
        run_M = order_M[:rows]
        x_MD = x_ND[run_M // k]
        if weigh_input:
            x_MD = (x_MD * weights_Nk.flatten()[run_M, None]).to(x_ND.dtype)
        y_MD = F.pad(self.products(x_MD, counts_E), (0, 0, 0, len(order_M) - rows))
        columns_M = torch.arange(len(order_M), device=order_M.device)
        # Back in the order of tokens a sum has a fixed order too, which adding by index has not on a GPU.
        y_NkD = y_MD[torch.empty_like(order_M).scatter(0, order_M, columns_M)].unflatten(0, (-1, k))
        weights_Nk = (experts_Nk < self.count).to(weights_Nk.dtype) if weigh_input else weights_Nk
        return (y_NkD * weights_Nk[..., None]).sum(1).to(x_ND.dtype)
