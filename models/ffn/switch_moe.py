"""Switch: each token passes one expert, and an expert has room for so many tokens of a row.

    p = softmax(W_r x);  y = p_e E_e(x),  e = argmax p,  0 where e has taken its capacity * T / E tokens before
    loss += balance * E sum_e f_e P_e

arXiv 2101.03961. A token that finds no room passes by: the residual stream carries it on. Room is a rule of training,
counted within a row; in eval and with a state every token has its expert.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import at_least
from models.ffn.moe import MoE
from models.layers.experts import Activation
from models.layers.routing import balance, load, wide
from models.span import Span
from models.state import State
from models.stateful import Place


class SwitchMoE(MoE):
    @dataclass(frozen=True)
    class Config:
        """hidden: units of an expert, 0 means 4 dim. capacity: room of an expert, in even shares of a row."""

        hidden: int = 0
        experts: int = 4
        activation: Activation = "relu"
        capacity: float = 1.25
        balance: float = 0.01

    def __init__(self, config: Config, place: Place) -> None:
        at_least(config, experts=1)
        if not config.capacity:
            raise ValueError("switch_moe: capacity=0.0 leaves no room for any token; give 1 or more")
        hidden = config.hidden or 4 * place.dim
        super().__init__(MoE.Config(hidden, config.experts, 1, config.activation, False, config.balance), place)
        self.capacity = config.capacity

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        training = self.training and state is None
        logits_BTE = wide(self.router, x_BTD)
        scores_BTE, chosen_BT1 = logits_BTE.softmax(-1), self.choice(logits_BTE, 1)
        weights_BT1 = scores_BTE.gather(-1, chosen_BT1)
        if training:
            count = self.config.experts
            balance(scores_BTE, load(chosen_BT1, count, at.valid_BT), at, self.config.balance)
            chosen_BT1 = self.with_room(chosen_BT1, at)
        y_ND = self.experts(x_BTD.flatten(0, 1), chosen_BT1.flatten(0, 1), weights_BT1.flatten(0, 1), some=training)
        return y_ND.view_as(x_BTD), state

    def with_room(self, chosen_BT1: Tensor, at: Span) -> Tensor:
        """The choices, `experts` (none) where the expert is full: first come, first served."""
        count = self.config.experts
        wanted_BTE = torch.zeros(*chosen_BT1.shape[:2], count, dtype=torch.int64, device=chosen_BT1.device)
        wanted_BTE = wanted_BTE.scatter(2, chosen_BT1, 1)
        if at.valid_BT is not None:
            wanted_BTE = wanted_BTE * at.valid_BT[..., None]
        place_BT1 = wanted_BTE.cumsum(1).gather(2, chosen_BT1)
        fits_BT1 = place_BT1 <= math.ceil(self.capacity * chosen_BT1.shape[1] / count)
        real = wanted_BTE.sum().clamp(min=1)
        at.log(dropped=1 - (fits_BT1 * wanted_BTE.gather(2, chosen_BT1)).sum() / real)
        return torch.where(fits_BT1, chosen_BT1, count)
