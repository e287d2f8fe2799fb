"""Differential attention: a head is the difference of two softmax maps, so the noise that both attend to cancels.

    y = W_o (1 - l_0) RMSNorm_h((softmax(q^1 k^1) - l softmax(q^2 k^2)) v),   l_0 = 0.8 - 0.6 exp(-0.3 layer)
    l = exp(a^1 . b^1) - exp(a^2 . b^2) + l_0

arXiv 2410.05258. Pairs are head i and head i + H/2, with values of twice a head's width, as in DiffLlama; its norm has
no weights either.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import kernels
from models.config import at_least
from models.mixers.gqa import GQA
from models.span import Span
from models.state import State, TensorSpec, append
from models.stateful import Place


class DiffTransformer(GQA):
    @dataclass(frozen=True)
    class Config:
        """heads, kv_heads: softmax maps and their keys, both even. The other options are those of `gqa`."""

        heads: int = 4
        kv_heads: int = 2
        head_dim: int = 0
        window: int = 0
        positions: str = "rope"
        bias: bool = False

    def __init__(self, config: Config, place: Place) -> None:
        at_least(config, heads=2, kv_heads=2)
        if config.heads % 2 or config.kv_heads % 2:
            raise ValueError(
                f"diff_transformer: heads={config.heads} and kv_heads={config.kv_heads} must be even, for pairs"
            )
        super().__init__(GQA.Config(**vars(config), out_bias=config.bias), place)
        self.lambdas = nn.Parameter(torch.randn(4, self.head_dim) * 0.1)  # a1 b1 a2 b2
        self.first = 0.8 - 0.6 * math.exp(-0.3 * place.layer)
        self.eps = place.eps

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        pairs, size, dtype = self.config.kv_heads // 2, self.head_dim, self.wo.weight.dtype
        key = TensorSpec((pairs, size), dtype, every=1, window=self.config.window)
        return {"k1": key, "k2": key, "v": replace(key, shape=(pairs, 2 * size))}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, at)
        k1, k2 = k_BTGK.chunk(2, 2)
        view, state = append(state, at, k1=k1, k2=k2, v=torch.cat(v_BTGK.chunk(2, 2), -1))
        a1, b1, a2, b2 = self.lambdas.float()
        weight = (a1 * b1).sum().exp() - (a2 * b2).sum().exp() + self.first
        maps = [self._map(i, q, view) for i, q in enumerate(q_BTHK.chunk(2, 2))]
        y_BTHV = kernels.rms_norm(maps[0] - weight * maps[1], eps=self.eps) * (1 - self.first)
        return self.wo(y_BTHV.flatten(2).to(x_BTD.dtype)), state

    def _map(self, index: int, q_BTHK: Tensor, view: kernels.View) -> Tensor:
        """The values under one of the two maps, (B, T, H/2, 2K) fp32."""
        names = {"k": f"k{index + 1}", "v": "v"}
        new, past = ({mine: part[name] for mine, name in names.items() if part} for part in (view.new, view.past))
        slopes = self.positions.slopes_H
        slopes = None if slopes is None else slopes.chunk(2)[index]
        view = replace(view, new=new, past=past)
        return kernels.attention(q_BTHK, view, window=self.config.window, slopes_H=slopes).float()
