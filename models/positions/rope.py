"""RoPE: pair i of a head turns by theta^(-2i/K) a token.

    q'_t . k'_j depends on t - j only;  factor > 1 slows all pairs (linear scaling, arXiv 2306.15595)

arXiv 2104.09864.
"""

from dataclasses import dataclass

from torch import Tensor

from models.config import above_zero
from models.layers.rotary import Rotary
from models.stateful import Place


class RoPE(Rotary):
    @dataclass(frozen=True)
    class Config(Rotary.Config):
        """factor: how much slower positions advance."""

        factor: float = 1.0

    def __init__(self, config: Config, dim: int, heads: int, place: Place) -> None:
        above_zero(config, "factor")
        super().__init__(config, dim, heads, place)

    def frequency(self, positions_BT: Tensor) -> Tensor:
        return super().frequency(positions_BT) / self.config.factor
