"""The plain cache: every key and value is kept as it is, as far as a window reads.

    k_1 .. k_t, v_1 .. v_t

arXiv 1706.03762. The others of this folder are built and called alike, and hold less.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import View
from models.span import Span
from models.state import State, TensorSpec, append

Attend = Callable[[Tensor, View], Tensor]


class Full(nn.Module):
    """Built as `Cache(config, heads, size, scale)`: key heads, their channels, the factor of scores.

    keeps, trees: as of `Stateful`.
    """

    family = "attention"
    keeps = trees = True  # nothing of fixed size to keep

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, config: Config, heads: int, size: int, scale: float) -> None:
        super().__init__()
        self.config, self.shape = config, (heads, size)

    def state_spec(self, dtype: torch.dtype, window: int = 0) -> dict[str, TensorSpec]:
        """What a row holds; dtype: of the weights. window: tokens that are ever read, 0 for all."""
        spec = TensorSpec(self.shape, dtype, every=1, window=window)
        return {"k": spec, "v": spec}

    def forward(
        self, attend: Attend, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, at: Span, state: State | None
    ) -> tuple[Tensor, State | None]:
        """What `attend` makes of the queries and of a view of the past and these tokens; the state after."""
        view, state = append(state, at, k=k_BTGK, v=v_BTGK)
        return attend(q_BTHK, view), state
