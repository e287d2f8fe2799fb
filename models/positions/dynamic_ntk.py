"""Dynamic NTK: past the trained length the base grows with the position, so that fast pairs keep their resolution.

    theta_t = theta (factor L_t / original - (factor - 1))^(K / (K - 2)),  L_t = max(t + 1, original)

The community's "NTK-aware" scaling, described in arXiv 2309.00071. Each token turns by the base of its own position, so
that a cached key never changes; implementations that turn a whole prompt by its last position agree up to `original`.
"""

from dataclasses import dataclass

from torch import Tensor

from models.config import above_zero
from models.layers.rotary import Rotary
from models.stateful import Place


class DynamicNTK(Rotary):
    @dataclass(frozen=True)
    class Config(Rotary.Config):
        """original: trained length. factor: how fast the base grows past it."""

        factor: float = 2.0
        original: int = 2048

        @classmethod
        def tiny(cls) -> "DynamicNTK.Config":
            return cls(original=8)

    def __init__(self, config: Config, dim: int, heads: int, place: Place) -> None:
        super().__init__(config, dim, heads, place)
        above_zero(config, "factor", "original")

    def frequency(self, positions_BT: Tensor) -> Tensor:
        c = self.config
        length_BT1 = (positions_BT + 1).clamp(min=c.original)[..., None].float()
        power = self.turned / max(self.turned - 2, 1)
        theta_BT1 = c.theta * (c.factor * length_BT1 / c.original - (c.factor - 1)) ** power
        return theta_BT1 ** -self.exponent(positions_BT.device)
