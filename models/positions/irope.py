"""iRoPE: most layers turn their heads; every few layers have no positions, and sharpen with the length instead.

    NoPE layers:  q'_t = q_t (1 + sharpness log(1 + floor((t + 1) / floor)))

Llama 4, after 2305.19466 (NoPE) and arXiv 2501.19399 (attention flattens over long documents). Layers `every`,
2 `every` and so on are the ones without; in Llama 4 the others attend in chunks (`chunked_attention`).
"""

from dataclasses import dataclass

from torch import Tensor

from models.config import at_least, parse_part
from models.layers.position import Position
from models.span import Span
from models.stateful import Place


class IRoPE(Position):
    @dataclass(frozen=True)
    class Config(Position.Config):
        """positions: the scheme of the layers that have one. floor, sharpness: how the others sharpen, as above."""

        positions: str = "rope"
        every: int = 4
        floor: int = 8192
        sharpness: float = 0.1

        @classmethod
        def tiny(cls) -> "IRoPE.Config":
            return cls(every=2, floor=4)

    def __init__(self, config: Config, dim: int, heads: int, place: Place) -> None:
        super().__init__(config, dim, heads, place)
        at_least(config, every=1, floor=1)
        scheme, options = parse_part(config.positions, "position")
        self.turned = scheme(options, dim, heads, place) if (place.layer + 1) % config.every else None
        if self.turned is not None:
            self.slopes_H = self.turned.slopes_H

    def query(self, q_BTHK: Tensor, at: Span) -> Tensor:
        if self.turned is not None:
            return self.turned.query(q_BTHK, at)
        times_BT = ((at.positions_BT + 1) // self.config.floor).float()
        scale_BT = times_BT.log1p() * self.config.sharpness + 1
        return (q_BTHK * scale_BT[..., None, None]).to(q_BTHK.dtype)

    def key(self, k_BTGK: Tensor, at: Span) -> Tensor:
        return k_BTGK if self.turned is None else self.turned.key(k_BTGK, at)
