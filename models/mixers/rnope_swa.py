"""RoPE near, nothing far: layers of sliding-window attention with rotary positions, and one of full attention without.

    layers S S S F S S S F ...:   S rope over the last `window` tokens,  F no positions, all tokens

arXiv 2501.18795. Far tokens are found by what they say alone, so no angle is ever larger than in training; near ones by
where they are. Only the full layers' cache grows. Cohere's Command R7B has it in parallel blocks with a LayerNorm.
"""

from dataclasses import dataclass

from models.config import at_least
from models.mixers.gqa import GQA
from models.stateful import Place


class RNoPESWA(GQA):
    @dataclass(frozen=True)
    class Config:
        """near: layers of a window before each full one. The other options are those of gqa."""

        heads: int = 4
        kv_heads: int = 2
        head_dim: int = 0
        window: int = 4096
        near: int = 3
        positions: str = "rope"
        bias: bool = False

        @classmethod
        def tiny(cls) -> "RNoPESWA.Config":
            return cls(window=8, near=1)

    def __init__(self, config: Config, place: Place) -> None:
        at_least(config, window=1)
        options = {name: value for name, value in vars(config).items() if name != "near"}
        if place.layer % (config.near + 1) == config.near:
            options |= {"window": 0, "positions": "nope"}
        super().__init__(GQA.Config(**options), place)
