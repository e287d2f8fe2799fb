"""Grouped-query attention whose weights are read in another way: the projections and state names of `gqa`, no more.

A dense checkpoint fits these mixers as it is. Their scores know places only through turned queries and keys.
"""

from dataclasses import dataclass, fields

from models import registry
from models.mixers.gqa import GQA
from models.stateful import Place


class Grouped(GQA):
    """options: the part's own Config; config: the gqa it would be."""

    trees = False

    @dataclass(frozen=True)
    class Config:
        """As of gqa."""

        heads: int = 4
        kv_heads: int = 2
        head_dim: int = 0
        positions: str = "rope"
        qk_norm: bool = False
        bias: bool = False

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(
            GQA.Config(**{field.name: getattr(config, field.name) for field in fields(Grouped.Config)}), place
        )
        if self.positions.slopes_H is not None:
            name = registry.name_of(type(self))
            raise ValueError(
                f"{name}.positions={config.positions!r}: biases by distance cannot be; choose rope or nope"
            )
        self.options = config
