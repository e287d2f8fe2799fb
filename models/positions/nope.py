"""NoPE: no positions; a causal mask alone lets a model count (arXiv 2305.19466)."""

from dataclasses import dataclass

from models.layers.position import Position


class NoPE(Position):
    @dataclass(frozen=True)
    class Config(Position.Config):
        """No options."""
