"""What queries and keys are told of where they stand: a scheme of models/positions/, named in a mixer's options."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.span import Span
from models.stateful import Place


class Position(nn.Module):
    """A scheme for heads of `dim` channels, built as `Scheme(config, dim, heads, place)`; this one says nothing.

    axes: that tokens stand on; text stands at the same number on all of them.
    slopes_H: of a bias on the scores linear in the distance (ALiBi), one for each of the `heads`; None for most.
    """

    family = "positions"
    axes = 1

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, config: Config, dim: int, heads: int, place: Place) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("slopes_H", None, persistent=False)

    def forward(self, x_BTHK: Tensor, places: Tensor) -> Tensor:
        """x (B, T, H, K) told its places, (B, T) or (B, T, axes) as in `Span.places`; dtype of x."""
        return x_BTHK

    def query(self, q_BTHK: Tensor, at: Span) -> Tensor:
        """The queries of a call; here as keys."""
        return self(q_BTHK, at.places)

    def key(self, k_BTGK: Tensor, at: Span) -> Tensor:
        """The keys of a call."""
        return self(k_BTGK, at.places)
