"""YaRN: slow pairs are interpolated, fast ones kept, in between a ramp; and attention is sharpened a little.

    f_i = f_i (1 - r_i) + f_i / factor * r_i,  r_i ramps from `fast` to `slow` turns over the trained length
    amplitude = 0.1 ln(factor) + 1

arXiv 2309.00071.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import above_zero
from models.layers.rotary import Rotary
from models.stateful import Place


class YaRN(Rotary):
    @dataclass(frozen=True)
    class Config(Rotary.Config):
        """factor: new length over the trained one, `original`. fast, slow: turns over that where the ramp begins, ends.

        amplitude: of the turned channels, 0 for 0.1 ln(factor) + 1. whole: the ramp's ends are rounded to whole pairs.
        """

        factor: float = 4.0
        original: int = 2048
        fast: float = 32.0
        slow: float = 1.0
        amplitude: float = 0.0
        whole: bool = True

        @classmethod
        def tiny(cls) -> "YaRN.Config":
            return cls(whole=False)

    def __init__(self, config: Config, dim: int, heads: int, place: Place) -> None:
        super().__init__(config, dim, heads, place)
        above_zero(config, "factor", "original", "fast", "slow")
        if config.theta <= 1:
            raise ValueError(f"yarn.theta={config.theta}: must be above 1, or no pair is slower than another")
        self.amplitude = config.amplitude or (0.1 * math.log(config.factor) + 1 if config.factor > 1 else 1.0)

    def frequency(self, positions_BT: Tensor) -> Tensor:
        c = self.config
        begin, end = (
            self.turned * math.log(c.original / (turns * 2 * math.pi)) / (2 * math.log(c.theta))
            for turns in (c.fast, c.slow)
        )
        if c.whole:
            begin, end = math.floor(begin), math.ceil(end)
        begin, end = max(begin, 0), min(end, self.turned - 1)
        pair_K = torch.arange(self.turned // 2, device=positions_BT.device, dtype=torch.float32)
        ramp_K = ((pair_K - begin) / (end - begin if end != begin else 1e-3)).clamp(0, 1)
        frequency_K = super().frequency(positions_BT)
        return frequency_K / c.factor * ramp_K + frequency_K * (1 - ramp_K)
