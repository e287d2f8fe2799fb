"""Sliding-window attention: a token sees itself and the `window - 1` before it, so the cache never holds more.

    y_t = W_o softmax_j(q_t . k_j / sqrt(K)) v_j,   t - window < j <= t

arXiv 2004.05150, 2310.06825 (Mistral). Grouped-query attention whose window is not optional.
"""

from dataclasses import dataclass

from models.mixers.gqa import GQA
from models.stateful import Place


class SlidingWindow(GQA):
    @dataclass(frozen=True)
    class Config(GQA.Config):
        """window: tokens seen, the current one included; at least 1."""

        window: int = 8

    def __init__(self, config: Config, place: Place) -> None:
        if config.window < 1:
            raise ValueError(f"sliding_window: window={config.window} must be at least 1")
        super().__init__(config, place)
