"""A memory of one matrix per head, which sums outer products of keys and values: what linear attentions share.

Kernels keep it, so documents, padding, chunks and rollback are their business; a mixer says what goes in and comes out.
"""

import torch
from torch import Tensor

import kernels
from models.config import at_least
from models.registry import name_of
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful


class MatrixMemory(Stateful):
    """`size` (H, K, V) of the memory is the subclass's to set; its config has `heads`, of which dim is a multiple."""

    family = "attention"
    keeps = True
    size: tuple[int, int, int]

    def __init__(self, config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1)
        if place.dim % config.heads:
            raise ValueError(f"{name_of(type(self))}: dim={place.dim} must be a multiple of heads={config.heads}")
        self.config, self.heads, self.head_dim = config, config.heads, place.dim // config.heads

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        return {"matrix": TensorSpec(self.size, torch.float32)}

    def by_head(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, H, D/H)"""
        return x_BTD.unflatten(-1, (self.heads, -1))

    def remember(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, decay: Tensor | None, at: Span, state: State | None, **how
    ) -> tuple[Tensor, State | None]:
        """`kernels.linear_attention` with the carried matrix; `how` are its options."""
        y_BTHV, matrix = kernels.linear_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            decay,
            state_BHKV=None if state is None else state["matrix"],
            segments_BT=at.segments_BT,
            keep=at.keep,
            **how,
        )
        return y_BTHV, None if state is None else {"matrix": matrix}
