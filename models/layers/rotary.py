"""Rotary position embedding: pairs of channels turn with the position, so scores depend on the distance alone.

A scheme (models/positions/) gives the frequency of each pair. Pairs are (i, i + K/2), as in Llama checkpoints. Angles
are computed in fp32 at each call: a table kept as a buffer would be rounded whenever a model is cast to bf16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import rope, rope_angles
from models.config import above_zero
from models.layers.position import Position
from models.stateful import Place


class Rotary(Position):
    """Of a head's `dim` channels the first `fraction` turn."""

    @dataclass(frozen=True)
    class Config(Position.Config):
        """theta: base of the frequencies. fraction: share of a head's channels that turn."""

        theta: float = 10000.0
        fraction: float = 1.0

    amplitude = 1.0  # of the turned channels, which scales the attention logits by its square

    def __init__(self, config: Config, dim: int, heads: int, place: Place) -> None:
        super().__init__(config, dim, heads, place)
        above_zero(config, "theta")
        self.turned = int(dim * min(config.fraction, 2.0))  # int() has no answer for what is too large for a float
        if self.turned % 2 or not 0 < self.turned <= dim:
            raise ValueError(
                f"positions: {self.turned} of {dim} channels of a head turn; it must be an even number from 2 to {dim}"
            )

    def frequency(self, positions_BT: Tensor) -> Tensor:
        """Radians per token of each pair, fp32, (K/2) or, where it depends on the position, (B, T, K/2)."""
        return self.config.theta ** -self.exponent(positions_BT.device)

    def exponent(self, device: torch.device) -> Tensor:
        """2i / K of each pair, fp32."""
        return torch.arange(0, self.turned, 2, device=device, dtype=torch.float32) / self.turned

    def angles(self, places: Tensor) -> Tensor:
        """Radians of each pair, (B, T, K/2) fp32."""
        if places.dim() != 2:
            raise ValueError(f"positions: {type(self).__name__} has one axis, the tokens stand on {places.shape[-1]}")
        return rope_angles(places, self.frequency(places))

    def forward(self, x_BTHK: Tensor, places: Tensor) -> Tensor:
        angle_BTR = self.angles(places)
        cos, sin = angle_BTR.cos(), angle_BTR.sin()
        if self.amplitude != 1:
            cos, sin = cos * self.amplitude, sin * self.amplitude
        return rope(x_BTHK, cos, sin)
