"""Residual branches and where their norms stand, which decides how gradients and activations grow with the depth.

    pre       x = x + f(N(x))             post   x = N(x + f(x))            inner  x = x + N(f(x))
    sandwich  x = x + N'(f(N(x)))         peri   sandwich, and the stack's input is normalised too
    parallel  x = x + f(N(x)) + g(N(x))   first  x = N(x); x = alpha x + beta f(x)
    two_hop   h = x + f(N(x)); x = x + g(N(h))

pre and post: arXiv 2002.04745; inner: 2501.00656 (OLMo 2); sandwich: 2105.13290 (CogView); peri: 2502.02732; parallel:
2204.02311 (PaLM); first: 2501.08313 (MiniMax-01); two_hop: 2404.08801 (Megalodon).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from models.block import Block
from models.layers import norm
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class NormPlacement(Block):
    @dataclass(frozen=True)
    class Config:
        """placement: one of the schemes above. alpha, beta: of each branch in `first`, one for all or one for each."""

        placement: Literal["pre", "post", "inner", "sandwich", "peri", "parallel", "first", "two_hop"] = "pre"
        alpha: tuple[float, ...] = (1.0,)
        beta: tuple[float, ...] = (1.0,)

        @classmethod
        def tiny(cls) -> "NormPlacement.Config":
            return cls(placement="first")

    def __init__(self, config: Config, branches: dict[str, Stateful], place: Place) -> None:
        super().__init__(config, branches, place)
        for field in ("alpha", "beta"):
            if len(getattr(config, field)) not in (1, len(branches)):
                raise ValueError(
                    f"norm_placement.{field}: give one for all, or one for each of {len(branches)} branches"
                )
            if config.placement != "first" and getattr(config, field) != (1.0,):
                raise ValueError(f"norm_placement.{field}: only placement=first weighs its branches")

        def made() -> norm.RMSNorm | norm.LayerNorm:
            return norm.make(place.norm, place.dim, place.eps)

        inside = config.placement in ("pre", "sandwich", "peri", "first", "two_hop")
        for name in self.branches if inside else self.branches[: config.placement == "parallel"]:
            self.add_module(f"{name}_norm", made())
        if config.placement in ("post", "inner", "sandwich", "peri"):
            for name in self.branches:
                self.add_module(f"{name}_out_norm", made())
        if config.placement == "peri" and place.layer == 0:
            self.entry_norm = made()

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        placement, after = self.config.placement, {}
        entry_BTD = x_BTD = self.entry_norm(x_BTD) if placement == "peri" and self.place.layer == 0 else x_BTD
        if placement == "parallel" and self.branches:
            inner_BTD = getattr(self, f"{self.branches[0]}_norm")(x_BTD)
        for i, name in enumerate(self.branches):
            if placement in ("pre", "sandwich", "peri", "first", "two_hop"):
                inner_BTD = getattr(self, f"{name}_norm")(x_BTD)
            elif placement != "parallel":
                inner_BTD = x_BTD
            y_BTD = self.run(name, inner_BTD, at, state, after)
            if placement in ("inner", "sandwich", "peri"):
                y_BTD = getattr(self, f"{name}_out_norm")(y_BTD)
            if placement == "first":
                alpha, beta = (factors[i % len(factors)] for factors in (self.config.alpha, self.config.beta))
                x_BTD = alpha * inner_BTD + beta * y_BTD
            elif placement == "two_hop":  # every branch adds to what entered the layer, so signals skip two at once
                x_BTD = entry_BTD + y_BTD
            else:
                x_BTD = x_BTD + y_BTD
            if placement == "post":
                x_BTD = getattr(self, f"{name}_out_norm")(x_BTD)
        return x_BTD, None if state is None else after
