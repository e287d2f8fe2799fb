"""Multi-head attention: every query head has keys and values of its own.

    y_t = W_o softmax_j(q_t . k_j / sqrt(K)) v_j,   j <= t

arXiv 1706.03762. Differs from the paper: positions turn queries and keys, as in Llama; `positions=nope` has none.
"""

from dataclasses import dataclass
from typing import Literal

from models.mixers.gqa import GQA
from models.stateful import Place


class Attention(GQA):
    @dataclass(frozen=True)
    class Config:
        """As of gqa, whose kv_heads are here the heads."""

        heads: int = 4
        head_dim: int = 0
        window: int = 0
        positions: str = "rope"
        scores: str = "softmax"
        mask: Literal["causal", "full"] = "causal"
        qk_norm: bool = False
        bias: bool = False
        out_bias: bool = False

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(GQA.Config(kv_heads=config.heads, **vars(config)), place)
