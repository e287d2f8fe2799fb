"""Mixture of attentions: a router gives each token the kind of attention it needs, within one layer.

    p = softmax(W_r x);  y = sum over the `selected` largest p_i of p_i kind_i(x)
    balance loss = kinds * sum_i (share of tokens given to i) * (mean of p_i)

After mixture of attention heads (arXiv 2210.05144), whose experts are heads of one kind, and switch routing
(2101.03961); here an expert is any mixer, told by name. Every kind reads every token: a recurrence would have holes,
and a cache cannot know what a later token asks for. So a choice says whose answer a token takes, and saves no
computation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.config import at_least, parse_part
from models.layers.choice import Choice
from models.span import Span
from models.state import State, TensorSpec, prefixed, scope
from models.stateful import Place, Stateful


class MixtureOfAttentions(Stateful):
    family = "attention"
    keeps = trees = True  # its kinds do

    @dataclass(frozen=True)
    class Config:
        """kinds: mixers, as in a pattern. selected: how many of them answer a token. balance: weight of its loss."""

        kinds: tuple[str, ...] = ("gqa(window=64)", "gated_deltanet", "gqa")
        selected: int = 1
        balance: float = 0.01

        @classmethod
        def tiny(cls) -> "MixtureOfAttentions.Config":
            return cls(kinds=("gqa(window=4)", "gated_deltanet"))

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, selected=1)
        if config.selected > len(config.kinds):
            name = f"mixture_of_attentions.selected={config.selected}"
            raise ValueError(f"{name}: kinds={list(config.kinds)} has {len(config.kinds)}; name at least as many")
        self.config = config
        parts = (parse_part(kind, "mixer") for kind in config.kinds)
        self.kinds = nn.ModuleList(part(part_config, place) for part, part_config in parts)
        self.causal = all(kind.causal for kind in self.kinds)
        self.router = nn.Linear(place.dim, len(self.kinds), bias=False)
        self.choice = Choice()

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        specs = (prefixed(str(i), kind.state_spec(max_len)) for i, kind in enumerate(self.kinds))
        return {name: spec for part in specs for name, spec in part.items()}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        p_BTE = self.router(x_BTD).float().softmax(-1)
        chosen_BTE = torch.zeros_like(p_BTE).scatter(2, self.choice(p_BTE, self.config.selected), 1.0)
        gate_BTE = (p_BTE * chosen_BTE).to(x_BTD.dtype)
        self._balance(p_BTE, chosen_BTE, at)
        y_BTD, after = 0.0, {}
        for i, kind in enumerate(self.kinds):
            part_BTD, part = kind(x_BTD, at, scope(state, str(i)))
            y_BTD = y_BTD + gate_BTE[..., i, None] * part_BTD
            after |= prefixed(str(i), part or {})
        return y_BTD, None if state is None else after

    def _balance(self, p_BTE: Tensor, chosen_BTE: Tensor, at: Span) -> None:
        valid_BT1 = torch.ones_like(p_BTE[..., :1]) if at.valid_BT is None else at.valid_BT[..., None].float()
        count = valid_BT1.sum().clamp(min=1)
        share_E, mean_E = ((x_BTE * valid_BT1).sum((0, 1)) / count for x_BTE in (chosen_BTE, p_BTE))
        if self.training and self.config.balance:
            loss = (share_E / self.config.selected * mean_E).sum() * len(self.kinds)
            at.losses.append(self.config.balance * loss)
        at.log(**{f"kind_{i}": share for i, share in enumerate(share_E)})
