"""Llama 3's RoPE: pairs that turn less than `low` times over the trained length are slowed by `factor`, fast ones kept.

    turns = original f_i / 2 pi;  s = clamp((turns - low) / (high - low), 0, 1);  f_i = f_i ((1 - s) / factor + s)

arXiv 2407.21783.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from models.config import above_zero
from models.layers.rotary import Rotary
from models.stateful import Place


class Llama3RoPE(Rotary):
    @dataclass(frozen=True)
    class Config(Rotary.Config):
        """factor: new length over the trained one, `original`. low, high: turns between which the two are blended."""

        factor: float = 8.0
        original: int = 8192
        low: float = 1.0
        high: float = 4.0

    def __init__(self, config: Config, dim: int, heads: int, place: Place) -> None:
        super().__init__(config, dim, heads, place)
        above_zero(config, "factor", "original")
        if config.low >= config.high:
            raise ValueError(f"llama3_rope.low={config.low}: must be below high={config.high}")

    def frequency(self, positions_BT: Tensor) -> Tensor:
        c = self.config
        frequency_K = super().frequency(positions_BT)
        blend_K = ((c.original * frequency_K / (2 * math.pi) - c.low) / (c.high - c.low)).clamp(0, 1)
        return frequency_K * ((1 - blend_K) / c.factor + blend_K)
