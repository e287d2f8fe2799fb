"""Chunked attention: a document is cut every `chunk` tokens, and a token sees its own chunk up to itself.

    y_t = W_o softmax_j(q_t . k_j / sqrt(K)) v_j,   j <= t  and  floor(j / chunk) = floor(t / chunk)

The local layers of Llama 4; full ones in between (`3*chunked_attention gqa`) pass on what chunks cannot. To kernels a
chunk is a document: cutting is renumbering, and the cache never holds more than a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from models.config import at_least
from models.mixers.gqa import GQA
from models.state import TensorSpec
from models.stateful import Place


class ChunkedAttention(GQA):
    trees = False  # chunks are numbered along the columns

    @dataclass(frozen=True)
    class Config(GQA.Config):
        """chunk: tokens."""

        chunk: int = 8

    def __init__(self, config: Config, place: Place) -> None:
        at_least(config, chunk=1)
        super().__init__(config, place)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        return self.cache.state_spec(self.wo.weight.dtype, self.config.chunk)

    def attend(self, q_BTHK: Tensor, view: kernels.View) -> Tensor:
        return super().attend(q_BTHK, self._cut(view))

    def _cut(self, view: kernels.View) -> kernels.View:
        """The view in which a chunk is a document; of the past it shows the chunk that goes on."""
        chunk, new = self.config.chunk, view.new["k"]
        at_BT, length_B, past = view.positions_BT, None, {}
        if at_BT is None:
            at_BT = torch.arange(new.shape[1], device=new.device).expand(new.shape[:2])
            at_BT = at_BT if view.length_B is None else at_BT + view.length_B[:, None]
        begins_BT = at_BT % chunk == 0
        if view.segments_BT is None:
            segments_BT = begins_BT.long().cumsum(1)
        else:
            real_BT = view.segments_BT >= 0
            segments_BT = torch.where(real_BT, (begins_BT & real_BT).long().cumsum(1), -1)
        if view.past:
            length_B = view.length_B % chunk
            slots_S = torch.arange(min(chunk, view.capacity), device=length_B.device)
            slot_BS = (view.length_B - length_B)[:, None] + slots_S
            past = {name: _read(view, name, slot_BS % view.capacity) for name in view.past}
        return kernels.View(view.new, past, length_B, at_BT % chunk, segments_BT)


def _read(view: kernels.View, name: str, slot_BS: Tensor) -> Tensor:
    """Slots of each row, (B, S, G, K)."""
    past = view.past[name]
    if view.table_BN is not None:
        size = past.shape[1]
        return past[view.table_BN.gather(1, slot_BS // size), slot_BS % size]
    return past.gather(1, slot_BS[..., None, None].expand(-1, -1, *past.shape[2:]))
