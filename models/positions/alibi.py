"""ALiBi: no positions in queries and keys; scores fall with the distance, by a slope of each head.

    l_tj = q_t . k_j / sqrt(K) - slope_h (t - j),   slope_h = 2^(-8 h / H) for h = 1..H

arXiv 2108.12409. For H no power of two, the slopes of the next lower power come first, then every second one of the
next higher power, as in the paper's code.
"""

from dataclasses import dataclass

import torch

from models.layers.position import Position
from models.stateful import Place


class ALiBi(Position):
    @dataclass(frozen=True)
    class Config(Position.Config):
        """No options."""

    def __init__(self, config: Config, dim: int, heads: int, place: Place) -> None:
        super().__init__(config, dim, heads, place)
        self.slopes_H = torch.tensor(slopes(heads))


def slopes(heads: int) -> list[float]:
    """One slope for each head, the steepest first."""
    power = 1 << (heads.bit_length() - 1)
    found = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return found + [2 ** (-4 * (2 * h + 1) / power) for h in range(heads - power)]
