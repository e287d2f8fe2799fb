"""Mixture of depths: some layers have room for a share of the tokens only, a router says which; the others pass by.

    x_t = x_t + sigmoid(r_t) (block(x)_t - x_t)  for the top share T of r = w . x + b;   x_t otherwise

arXiv 2404.02258. In training the choice sees the row; the block sees the chosen tokens alone, at their places. Token
by token it is r > 0, which an auxiliary cross-entropy on r teaches to mean the same. A layer's cache holds the tokens
that passed it. Differs from the paper: the weight is sigmoid(r) where it has r itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.config import at_least
from models.decoder import Decoder
from models.layers import depth
from models.layers.choice import Choice
from models.layers.routing import wide
from models.span import Span
from models.stack import Stack
from models.state import State, TensorSpec
from models.stateful import Stateful


class MixtureOfDepths(Decoder):
    family = "meta"

    @dataclass(frozen=True)
    class Config(Decoder.Config):
        """share: of a row's tokens that a routed layer takes. every: how many layers one of which is routed, the last.

        auxiliary: weight of the loss that teaches routers to decide by one token.
        """

        share: float = 0.125
        every: int = 2
        auxiliary: float = 0.01

        @classmethod
        def tiny(cls) -> "MixtureOfDepths.Config":
            return cls(vocab=64, dim=64, layers=2, share=0.5)

    @classmethod
    def stack(cls, config: Config, **options: Any) -> Stack:
        at_least(config, every=1)
        if not 0 < config.share <= 1:
            raise ValueError(f"mixture_of_depths.share={config.share}: must be above 0 and at most 1")
        if config.every > config.layers:
            raise ValueError(f"mixture_of_depths.every={config.every}: of layers={config.layers} none would be routed")
        layers = super().stack(config, **options)
        for layer in range(config.every - 1, config.layers, config.every):
            if layers[layer].alone:
                raise ValueError(f"mixture_of_depths: block={config.block!r} has several streams, a router reads one")
            layers[layer] = Routed(layers[layer], config)
        return layers


class Routed(Stateful):
    """A block for some of the tokens."""

    keeps = True

    def __init__(self, block: Stateful, config: MixtureOfDepths.Config) -> None:
        super().__init__()
        self.block, self.share, self.auxiliary = block, config.share, config.auxiliary
        self.router = nn.Linear(config.dim, 1)
        self.choice = Choice()

    @property
    def causal(self) -> bool:
        return self.block.causal

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        return depth.spec(self.block, max_len)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        logits_BT = wide(self.router, x_BTD)[..., 0]
        weight_BT1 = logits_BT.sigmoid()[..., None]
        if self.training and state is None:
            index_Bk = depth.largest(self.choice, logits_BT, max(1, round(self.share * x_BTD.shape[1])), at.valid_BT)
            depth.teach(logits_BT, index_Bk, at, self.auxiliary, at.valid_BT)
            x_BkD, weight_Bk1 = depth.columns(x_BTD, index_Bk), depth.columns(weight_BT1, index_Bk)
            y_BkD = depth.together(self.block, x_BTD, at, index_Bk)
            return depth.put(x_BTD, index_Bk, x_BkD + weight_Bk1 * (y_BkD - x_BkD)), None
        passing_BT = depth.passes(self.choice, logits_BT)
        y_BTD, state = depth.one_by_one(self.block, x_BTD, at, state, passing_BT)
        y_BTD = (x_BTD + weight_BT1 * (y_BTD - x_BTD)).to(x_BTD.dtype)
        return torch.where(passing_BT[..., None], y_BTD, x_BTD), state
