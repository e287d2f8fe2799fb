"""Mixture of experts: each token passes the few feed-forward networks its router scores highest.

    p = softmax(W_r x);  y = sum_{e in top-k} p_e / (sum of the k) E_e(x)
    loss += balance * E sum_e f_e P_e          f: share of the choices, P: mean of p

arXiv 1701.06538, 2006.16668 (GShard); as in Mixtral, 2401.04088. Routing is per token and drops nothing. The loss is
added layer by layer, where Mixtral's takes f and P over all layers together.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.config import at_least
from models.layers.experts import Activation, Experts
from models.layers.routing import Few, balance, load, wide
from models.registry import name_of
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class MoE(Stateful):
    family = "meta"
    exact = False  # an expert multiplies all its tokens at once

    @dataclass(frozen=True)
    class Config:
        """hidden: units of an expert, 0: active ones have together what a SwiGLU has. active: experts of a token.

        normalize: the weights of a token add up to 1. balance: weight of the balance loss.
        """

        hidden: int = 0
        experts: int = 4
        active: int = 2
        activation: Activation = "swiglu"
        normalize: bool = True
        balance: float = 0.01

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, experts=1, active=1)
        if config.active > config.experts:
            raise ValueError(f"{name_of(type(self))}: active={config.active} must be at most experts={config.experts}")
        self.config = config
        hidden = config.hidden or -(-place.dim * 8 // (3 * config.active) // 16) * 16
        self.router = nn.Linear(place.dim, config.experts, bias=False)
        self.choice = Few()
        self.experts = Experts(place.dim, hidden, config.experts, config.activation, place.layers)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        logits_BTE = wide(self.router, x_BTD)
        scores_BTE = logits_BTE.softmax(-1)
        chosen_BTk = self.choice(logits_BTE, self.config.active)
        if self.training and state is None:
            balance(scores_BTE, load(chosen_BTk, self.config.experts, at.valid_BT), at, self.config.balance)
        weights_BTk = self.weights(scores_BTE, chosen_BTk)
        y_ND = self.experts(x_BTD.flatten(0, 1), chosen_BTk.flatten(0, 1), weights_BTk.flatten(0, 1))
        return y_ND.view_as(x_BTD), state

    def weights(self, scores_BTE: Tensor, chosen_BTk: Tensor) -> Tensor:
        """Of the experts chosen, (B, T, k)."""
        weights_BTk = scores_BTE.gather(-1, chosen_BTk)
        if self.config.normalize:
            weights_BTk = weights_BTk / (weights_BTk.sum(-1, keepdim=True) + 1e-20)
        return weights_BTk
