"""NoPE: no positions; a causal mask alone lets a model count (arXiv 2305.19466)."""

from dataclasses import dataclass

from torch import Tensor, nn


class NoPE(nn.Module):
    family = "positions"

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        return x_BTHK
