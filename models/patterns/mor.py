"""Mixture of recursions: one shared block in the middle, which each token passes as often as its routers let it.

    x_t = x_t + scale sigmoid(r_t) block(x)_t,  r = w_i . x + b_i,  for t in S_i,  i = 1 .. steps
    S_1: all tokens;  S_i: the top (steps + 1 - i) / steps T of S_{i-1} by r

arXiv 2507.10524: the first and the last layer are their own, all between are shared by the recursions (middle cycle),
routers choose tokens (expert choice). In training the choice sees the row; token by token it is r > 0, which an
auxiliary cross-entropy on r teaches to mean the same. Each recursion caches the keys and values of the tokens that are
in it, and no others. Differs from the paper: routers have a bias; no warm-up of the share, no z-loss.
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
from models.stack import Layers, Stack
from models.state import State, TensorSpec, prefixed, scope
from models.stateful import Stateful


class MoR(Decoder):
    family = "meta"

    @dataclass(frozen=True)
    class Config(Decoder.Config):
        """layers: of which all but the first and the last are shared. steps: recursions. scale: of what one adds.

        auxiliary: weight of the loss that teaches routers to decide by one token.
        """

        steps: int = 3
        scale: float = 0.1
        auxiliary: float = 0.01

        @classmethod
        def tiny(cls) -> "MoR.Config":
            return cls(vocab=64, dim=64, layers=3, scale=0.5)

    @classmethod
    def stack(cls, config: Config, **options: Any) -> Stack:
        at_least(config, layers=3, steps=1)
        layers = super().stack(config, **options)
        if any(block.alone for block in layers):
            raise ValueError(f"mor: block={config.block!r} has several streams, a router reads one")
        layers[1] = Recursion(Layers(list(layers)[1:-1]), config)
        del layers[2:-1]
        return layers


class Recursion(Stateful):
    """The shared layers and a router for each time they are passed."""

    keeps = True

    def __init__(self, shared: Layers, config: MoR.Config) -> None:
        super().__init__()
        self.shared, self.scale, self.auxiliary = shared, config.scale, config.auxiliary
        self.routers = nn.ModuleList(nn.Linear(config.dim, 1) for _ in range(config.steps))
        self.choice = Choice()

    @property
    def causal(self) -> bool:
        return self.shared.causal

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        spec = {}
        for step in range(len(self.routers)):
            spec |= prefixed(str(step), depth.spec(self.shared, max_len))
        return spec

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        if self.training and state is None:
            return self._choose(x_BTD, at), None
        after, passing_BT = {}, torch.ones_like(at.positions_BT, dtype=torch.bool)
        for step, router in enumerate(self.routers):
            logits_BT = wide(router, x_BTD)[..., 0]
            if step:
                passing_BT = passing_BT & depth.passes(self.choice, logits_BT)
            y_BTD, part = depth.one_by_one(self.shared, x_BTD, at, scope(state, str(step)), passing_BT)
            y_BTD = (x_BTD + self.scale * logits_BT.sigmoid()[..., None] * y_BTD).to(x_BTD.dtype)
            x_BTD = torch.where(passing_BT[..., None], y_BTD, x_BTD)
            after |= prefixed(str(step), part or {})
        return x_BTD, None if state is None else after

    def _choose(self, x_BTD: Tensor, at: Span) -> Tensor:
        """All recursions over whole rows, each over fewer of the tokens of the one before."""
        steps, tokens, open_BT = len(self.routers), x_BTD.shape[1], at.valid_BT
        for step, router in enumerate(self.routers):
            logits_BT = wide(router, x_BTD)[..., 0]
            index_Bk = depth.largest(self.choice, logits_BT, -(-tokens * (steps - step) // steps), open_BT)
            if step:
                depth.teach(logits_BT, index_Bk, at, self.auxiliary, open_BT)
            weight_Bk1 = self.scale * depth.columns(logits_BT, index_Bk).sigmoid()[..., None]
            y_BkD = depth.together(self.shared, x_BTD, at, index_Bk)
            x_BTD = depth.put(x_BTD, index_Bk, depth.columns(x_BTD, index_Bk) + weight_Bk1 * y_BkD)
            chosen_BT = torch.zeros_like(at.positions_BT, dtype=torch.bool).scatter(1, index_Bk, True)
            open_BT = chosen_BT if open_BT is None else chosen_BT & open_BT
        return x_BTD
