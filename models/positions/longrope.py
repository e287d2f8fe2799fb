"""LongRoPE: a searched factor for each pair, one set up to the trained length and another past it.

    f_i = theta^(-2i/K) / s_i,  s = short_i for positions below `original`, long_i from there on

arXiv 2402.13753. Each token turns by the set of its own position, so that a cached key never changes; implementations
that turn a whole prompt by the set of its length agree up to `original`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.layers.rotary import Rotary
from models.stateful import Place


class LongRoPE(Rotary):
    @dataclass(frozen=True)
    class Config(Rotary.Config):
        """short, long: a factor for each pair, or one. original: trained length. amplitude: of the turned channels."""

        short: tuple[float, ...] = (1.0,)
        long: tuple[float, ...] = (4.0,)
        original: int = 2048
        amplitude: float = 1.0

        @classmethod
        def tiny(cls) -> "LongRoPE.Config":
            return cls(original=8)

    def __init__(self, config: Config, dim: int, heads: int, place: Place) -> None:
        super().__init__(config, dim, heads, place)
        self.amplitude = config.amplitude
        for name, factors in (("short", config.short), ("long", config.long)):
            if len(factors) not in (1, self.turned // 2):
                raise ValueError(f"longrope.{name}: {len(factors)} factors, expected 1 or {self.turned // 2}")
            if min(factors) <= 0:
                raise ValueError(f"longrope.{name}={factors}: every factor must be above 0")

    def frequency(self, positions_BT: Tensor) -> Tensor:
        factor_K, long_K = (torch.tensor(f, device=positions_BT.device) for f in (self.config.short, self.config.long))
        factor_BTK = torch.where(positions_BT[..., None] < self.config.original, factor_K, long_K)
        return super().frequency(positions_BT) / factor_BTK
