"""Griffin: recurrent layers for what is far and, after every few of them, one of local attention for what is near.

    layers R R A R R A ...:   R the gated block of `hawk`,  A multi-query attention over the last `window` tokens

arXiv 2402.19427. Of a head's channels half turn with the position; the projection back has a bias. Maps one to one on
RecurrentGemma.
"""

from dataclasses import dataclass

from torch import Tensor

from models.config import at_least
from models.mixers.gqa import GQA
from models.mixers.hawk import Hawk
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful


class Griffin(Stateful):
    family = "attention"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """recurrent: layers before each one of attention. width, conv: of the recurrent layers, as in `hawk`.

        heads: of the queries and of the gates' matrices. kv_heads, window, positions: of the attention.
        """

        recurrent: int = 2
        heads: int = 4
        width: int = 0
        conv: int = 4
        kv_heads: int = 1
        window: int = 2048
        positions: str = "rope(fraction=0.5)"

        @classmethod
        def tiny(cls) -> "Griffin.Config":
            return cls(recurrent=1, window=8)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, window=1)
        self.config = c = config
        if place.layer % (c.recurrent + 1) < c.recurrent:
            self.inner = Hawk(Hawk.Config(c.width, c.heads, c.conv), place)
        else:
            attention = GQA.Config(c.heads, c.kv_heads, window=c.window, positions=c.positions, out_bias=True)
            self.inner = GQA(attention, place)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        return self.inner.state_spec(max_len)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        return self.inner(x_BTD, at, state)
