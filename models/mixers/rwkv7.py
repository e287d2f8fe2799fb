"""RWKV-7 time mix ("Goose"): a matrix memory that decays per channel and replaces what a key holds, at its own rate.

    S_t = diag(w_t) S_{t-1} - (n_t a_t) (S_{t-1}^T n_t)^T + k_t v_t^T;  y_t = S_t^T r_t,   n = k k_k / |k k_k|
    w = exp(-e^(-1/2) sig(.)),  a = sig(.),  k <- k (1 + (a - 1) k_a),  v <- v + (v_first - v) sig(.)
    out = W_o((GroupNorm(y) + (sum r k r_k) v) g)

arXiv 2503.14456. Every input is a mix with the token before; w, a, g and the way back to the first layer's values are
low-rank. Starting values as in the authors' code but for W_r, W_k, W_v, which the decoder draws; blocks have RMSNorm.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.config import at_least
from models.layers.shift import previous
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful

MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # exponents of the token-shift curves
RANKS = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}  # times sqrt(dim)
EPS = 64e-5  # of the group norm
VALUE = "rwkv7.value"  # name under which the first layer hands its values up the stack


class RWKV7(Stateful):
    family = "attention"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """heads of dim / heads channels. rank: of the low-rank maps, 0 for the authors' choice by width."""

        heads: int = 4
        rank: int = 0

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1)
        dim, heads = place.dim, config.heads
        if dim % heads:
            raise ValueError(f"rwkv7: dim={dim} must be a multiple of heads={heads}")
        self.heads, self.head_dim, self.first = heads, dim // heads, place.layer == 0
        deep = place.layer / max(1, place.layers - 1)
        rest = 1 - place.layer / place.layers
        channel = torch.arange(dim) / dim
        line = torch.linspace(0, 1, dim)
        zigzag = torch.linspace(-1, 1, self.head_dim).repeat(heads)  # across each head
        zigzag = zigzag * zigzag.abs()
        self.mix = nn.Parameter(torch.stack([1 - channel ** (exponent * rest) for exponent in MIXES.values()]))
        self.w0 = nn.Parameter(-5.5 + 6 * line ** (1 + deep**0.3) + 2.5 * zigzag)
        self.a0 = nn.Parameter(-0.19 + 0.3 * zigzag + 0.4 * (line - 0.5))
        if not self.first:
            self.v0 = nn.Parameter(0.73 - 0.4 * (line - 0.5))
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, factor in RANKS.items():
            if name != "v" or not self.first:
                rank = config.rank or max(32, round(factor * dim**0.5 / 32) * 32)
                self.down[name] = nn.Parameter(torch.zeros(rank, dim))
                gain = 0.1 * max(1, rank / dim) ** 0.5
                self.up[name] = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, dim), gain).T.contiguous())
        self.k_k = nn.Parameter(0.71 - 0.1 * (line - 0.5))
        self.k_a = nn.Parameter(torch.full((dim,), 1.02))
        self.r_k = nn.Parameter(torch.full((heads, self.head_dim), -0.04))
        self.wr, self.wk, self.wv = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.wo = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.wo.weight)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        size = self.head_dim
        return {
            "shift": TensorSpec((self.heads * size,), self.wo.weight.dtype),
            "matrix": TensorSpec((self.heads, size, size), torch.float32),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        carried = state or {}
        before_BTD, tail = previous(x_BTD, at, carried.get("shift"))
        mixed = dict(zip(MIXES, (torch.lerp(x_BTD, before_BTD, mix_D) for mix_D in self.mix.unbind(0))))
        r_BTHK = self._by_head(self.wr(mixed["r"]))
        k_BTHK = self._by_head(self.wk(mixed["k"])).float()
        v_BTD = self.wv(mixed["v"])
        first_BTD = at.shared.setdefault(VALUE, v_BTD)  # in a hybrid the lowest layer of this kind comes first
        if not self.first:
            v_BTD = torch.lerp(v_BTD, first_BTD, (self.v0 + self._low_rank("v", mixed["v"])).sigmoid())
        v_BTHV = self._by_head(v_BTD)
        decay_BTD = -(math.e**-0.5) * (self.w0.float() + self._low_rank("w", mixed["w"], torch.tanh).float()).sigmoid()
        a_BTHK = self._by_head((self.a0.float() + self._low_rank("a", mixed["a"]).float()).sigmoid())
        gate_BTD = self._low_rank("g", mixed["g"], torch.sigmoid)
        key_BTHK = F.normalize(k_BTHK * self._by_head(self.k_k.float()), dim=-1)
        k_BTHK = k_BTHK * (1 + (a_BTHK - 1) * self._by_head(self.k_a.float()))
        y_BTHV, matrix = kernels.generalized_delta(
            r_BTHK,
            k_BTHK,
            v_BTHV.float(),
            self._by_head(decay_BTD),
            -key_BTHK,
            key_BTHK * a_BTHK,
            state_BHKV=carried.get("matrix"),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        y_BTHV = F.layer_norm(y_BTHV, y_BTHV.shape[-1:], eps=EPS)
        y_BTHV = y_BTHV * self._by_head(self.norm_weight.float()) + self._by_head(self.norm_bias.float())
        y_BTHV = y_BTHV + (r_BTHK * k_BTHK * self.r_k.float()).sum(-1, keepdim=True) * v_BTHV
        y_BTD = self.wo(y_BTHV.flatten(2).to(x_BTD.dtype) * gate_BTD)
        return y_BTD, None if state is None else {"shift": tail, "matrix": matrix}

    def _by_head(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H, K)"""
        return x.unflatten(-1, (self.heads, self.head_dim))

    def _low_rank(self, name: str, x_BTD: Tensor, between=lambda x: x) -> Tensor:
        return F.linear(between(F.linear(x_BTD, self.down[name])), self.up[name])
