"""RWKV-6 time mix ("Finch"): a matrix memory whose channels decay as each token says, and a bonus for that token.

    S_t = diag(e^(w_t)) S_{t-1} + k_t v_t^T;  y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t
    out = W_o (GroupNorm(y) silu(g))
    w = -exp(w_0 + B tanh(A x_w));  x_i = x + (x_before - x) (mu_i + B_i tanh(A_i x_m)) for each of w, k, v, r, g

arXiv 2404.05892. x_m = x + (x_before - x) mu_x. `eagle` is RWKV-5: mu and w are the same for every token. Starting
values as in the authors' code but for the matrices, which the decoder draws. Its ffn is `channel_mix(receptance=True)`.

A token is read before it is written and before it decays, so what goes into the memory is one token late.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import at_least
from models.layers.matrix_memory import MatrixMemory
from models.layers.shift import previous
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place

EPS = 64e-5  # of the group norm


class RWKV6(MatrixMemory):
    @dataclass(frozen=True)
    class Config:
        """rank: of the map behind each mix; the decay's has twice that. eagle: nothing but r, k, v, g depends on x."""

        heads: int = 4
        rank: int = 32
        eagle: bool = False

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        at_least(config, rank=1)
        dim, rank = place.dim, config.rank
        self.size = (self.heads, self.head_dim, self.head_dim)
        deep, rest = place.layer / max(1, place.layers - 1), 1 - place.layer / place.layers
        channel, line = torch.arange(dim) / dim, torch.linspace(0, 1, dim)
        curve, flat = channel**rest, channel ** (0.5 * rest)
        mixes = {"k": curve, "v": curve + 0.3 * deep, "r": flat, "g": flat, "w": curve}
        if config.eagle:
            del mixes["w"]
        self.mix = nn.Parameter(1 - torch.stack(list(mixes.values())))
        self.names = tuple(mixes)
        if not config.eagle:
            self.mix_x = nn.Parameter(1 - curve)
            self.mix_down = nn.Parameter(torch.zeros(len(mixes), rank, dim))
            self.mix_up = nn.Parameter(torch.empty(len(mixes), rank, dim).uniform_(-0.01, 0.01))
            self.decay_down = nn.Parameter(torch.zeros(2 * rank, dim))
            self.decay_up = nn.Parameter(torch.empty(2 * rank, dim).uniform_(-0.01, 0.01))
        self.log_decay = nn.Parameter(-6 + 5 * line ** (0.7 + 1.3 * deep))
        self.bonus = nn.Parameter(deep * (1 - line) + 0.1 * ((torch.arange(dim) + 1) % 3 - 1))
        self.wk, self.wv, self.wr, self.wg = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.wo = nn.Linear(dim, dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        dim = self.wo.out_features
        waiting = TensorSpec((3 * dim,), torch.float32)  # the last token's key, value and decay, not yet in the memory
        return {"shift": TensorSpec((dim,), self.wo.weight.dtype), "waiting": waiting, **super().state_spec(max_len)}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        carried = state or {}
        before_BTD, tail = previous(x_BTD, at, carried.get("shift"))
        mixed = self._mix(x_BTD, before_BTD - x_BTD)
        k_BTD, v_BTD, r_BTD = self.wk(mixed["k"]).float(), self.wv(mixed["v"]).float(), self.wr(mixed["r"]).float()
        decay_BTD = self.log_decay.float().expand_as(k_BTD)
        if not self.config.eagle:
            inner_BTR = torch.einsum("btd,rd->btr", mixed["w"], self.decay_down).tanh()
            decay_BTD = decay_BTD + torch.einsum("btr,rd->btd", inner_BTR, self.decay_up).float()
        late, waiting = previous(torch.cat([k_BTD, v_BTD, -decay_BTD.exp()], -1), at, carried.get("waiting"))
        late_k, late_v, late_decay = (self.by_head(x) for x in late.chunk(3, -1))
        r_BTHK, v_BTHV = self.by_head(r_BTD), self.by_head(v_BTD)
        y_BTHV, after = self.remember(r_BTHK, late_k, late_v, late_decay, at, state)
        now_BTH = (r_BTHK * self.by_head(k_BTD * self.bonus.float())).sum(-1, keepdim=True)
        y_BTHV = F.layer_norm(y_BTHV + now_BTH * v_BTHV, (self.head_dim,), eps=EPS)
        y_BTD = y_BTHV.flatten(2) * self.norm_weight.float() + self.norm_bias.float()
        y_BTD = self.wo((y_BTD * F.silu(self.wg(mixed["g"]).float())).to(x_BTD.dtype))
        return y_BTD, None if state is None else {"shift": tail, "waiting": waiting, **after}

    def _mix(self, x_BTD: Tensor, step_BTD: Tensor) -> dict[str, Tensor]:
        """What each map reads: somewhere between the token and the one before it."""
        mixes = self.mix.unbind(0)
        if not self.config.eagle:
            inner_BTNR = torch.einsum("btd,nrd->btnr", x_BTD + step_BTD * self.mix_x, self.mix_down).tanh()
            mixes = (self.mix + torch.einsum("btnr,nrd->btnd", inner_BTNR, self.mix_up)).unbind(2)
        return {name: x_BTD + step_BTD * mix for name, mix in zip(self.names, mixes)}
