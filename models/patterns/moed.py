"""Mixture of expert depths: experts are feed-forward networks of 0, 1, 2 ... layers, and a token picks how deep to go.

    y = x + p_d E_d(N(x)),  p = softmax(W_r N(x)),  d = argmax p
    E_0(u) = 0;  E_d(u) = f_1 + .. + f_d,  f_1 = F_d1(u),  f_j = F_dj(N_j(u + f_1 + .. + f_{j-1}))
    loss += balance * D sum_d share_d mean(p_d)

No paper has this name; it is the integrated form of mixture of depths, arXiv 2404.02258: a no-op among the experts, so
that easy tokens cost nothing. Here every expert has another depth, and tokens choose. Attention is for all.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.config import at_least
from models.decoder import Decoder
from models.layers.experts import Experts
from models.layers.norm import RMSNorm
from models.layers.routing import Few, balance, load, wide
from models.span import Span
from models.stack import Stack
from models.state import State
from models.stateful import Place, Stateful


class MoED(Decoder):
    family = "meta"

    @dataclass(frozen=True)
    class Config(Decoder.Config):
        """deepest: layers of the deepest expert. hidden: units of each, 0 means 8/3 dim. balance: weight of the loss.

        ffn: a further branch after the experts, for all tokens.
        """

        ffn: str = "none"
        deepest: int = 2
        hidden: int = 0
        balance: float = 0.01

    @classmethod
    def stack(cls, config: Config, **options: Any) -> Stack:
        at_least(config, deepest=1)
        return super().stack(config, extra=lambda place: {"depths": Depths(config, place)}, **options)


class Depths(Stateful):
    """The experts of one layer."""

    exact = False

    def __init__(self, config: MoED.Config, place: Place) -> None:
        super().__init__()
        self.balance, deepest = config.balance, config.deepest
        hidden = config.hidden or -(-place.dim * 8 // 3 // 16) * 16
        self.router = nn.Linear(place.dim, deepest + 1, bias=False)
        self.choice = Few()
        # Layer j of all the experts that have one, the shallowest first.
        self.levels = nn.ModuleList(
            Experts(place.dim, hidden, deepest - level, "swiglu", place.layers) for level in range(deepest)
        )
        self.norms = nn.ModuleList(RMSNorm(place.dim, place.eps) for _ in range(deepest - 1))

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        logits_BTE = wide(self.router, x_BTD)
        scores_BTE, depth_BT1 = logits_BTE.softmax(-1), self.choice(logits_BTE, 1)
        if self.training and state is None:
            depths = scores_BTE.shape[-1]
            balance(scores_BTE, load(depth_BT1, depths, at.valid_BT), at, self.balance)
            at.log(depth=depth_BT1.float().mean())
        weight_N1 = scores_BTE.gather(-1, depth_BT1).flatten(0, 1)
        u_ND, depth_N1, total_ND = x_BTD.flatten(0, 1), depth_BT1.flatten(0, 1), 0
        for level, experts in enumerate(self.levels):
            expert_N1 = (depth_N1 - 1 - level).where(depth_N1 > level, experts.count)
            inner_ND = self.norms[level - 1](u_ND + total_ND) if level else u_ND
            total_ND = total_ND + experts(inner_ND, expert_N1, weight_N1.new_ones(weight_N1.shape), some=True)
        return (weight_N1 * total_ND).to(x_BTD.dtype).view_as(x_BTD), state
