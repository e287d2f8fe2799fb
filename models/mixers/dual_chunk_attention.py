"""Dual chunk attention: a model reads contexts longer than it was trained on, by telling queries shorter distances.

    s = chunk - local;  a key at j stands at j mod s;  a query at i stands, for a key of
    its own chunk of s tokens: i mod s;  the chunk before: min(i mod s + s, chunk);  any older chunk: chunk
    y = softmax over all keys with these places

arXiv 2402.17463 (ChunkLlama). The weights are those of `gqa`, and so are the outputs up to `chunk` tokens; no distance
ever exceeds `chunk`, at most the trained length. A key's place never changes, so a cache holds it as it is.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.config import at_least
from models.layers.compressed import room
from models.layers.grouped import Grouped
from models.layers.merged import merged_attention
from models.reading import line
from models.span import Span
from models.state import State, append
from models.stateful import Place


class DualChunkAttention(Grouped):
    @dataclass(frozen=True)
    class Config(Grouped.Config):
        """As of gqa; and: chunk: the largest distance, about 3/4 of the trained length. local: tokens of the chunk
        before to which distances stay exact, about 1/8 of it."""

        chunk: int = 1536
        local: int = 256

        @classmethod
        def tiny(cls) -> "DualChunkAttention.Config":
            return cls(chunk=8, local=3)

    def __init__(self, config: Config, place: Place) -> None:
        at_least(config, chunk=1)
        if config.local >= config.chunk:
            raise ValueError(f"dual_chunk_attention.local={config.local}: must be below chunk={config.chunk}")
        super().__init__(config, place)
        self.size = config.chunk - config.local  # of a chunk

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.config
        chunk = self.options.chunk
        if at.places_BTA is not None:
            raise ValueError("dual_chunk_attention: a token stands where its index in the document says; no places")
        heads_BTHK = self.wqkv(x_BTD).unflatten(-1, (c.heads + 2 * c.kv_heads, self.head_dim))
        q_BTHK, k_BTGK, v_BTGV = heads_BTHK.split([c.heads, c.kv_heads, c.kv_heads], 2)
        q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        inner_BT = at.positions_BT % self.size
        k_BTGK = self.positions.key(k_BTGK, replace(at, places_BTA=inner_BT))
        view, after = append(state, at, k=k_BTGK, v=v_BTGV)
        if state is None and x_BTD.shape[1] <= self.size:
            return self.wo(self.attend(self.positions.query(q_BTHK, at), view).flatten(2)), after
        places = (inner_BT, (inner_BT + self.size).clamp(max=chunk), torch.full_like(inner_BT, chunk))
        q_PBTHK = torch.stack([self.positions.query(q_BTHK, replace(at, places_BTA=place)) for place in places])
        k_BSGK, index_BS, segments_BS = line(view, "k")
        chunks = room(view, at, self.size) + 1
        chunk_BT, inside_BT = at.positions_BT // self.size, segments_BS[:, -x_BTD.shape[1] :]
        # Chunks of documents are numbered through: a query reads those equal to its own, one less, and all before.
        own_BT = torch.where(inside_BT >= 0, inside_BT * chunks + chunk_BT, -1)
        before_BT = torch.where((inside_BT >= 0) & (chunk_BT > 0), own_BT - 1, -1)
        keys_BS = torch.where(segments_BS >= 0, segments_BS * chunks + index_BS // self.size, -1)
        older_BT = (chunk_BT - 1) * self.size - 1
        y_BTHV = merged_attention(
            q_PBTHK,
            k_BSGK,
            line(view, "v")[0],
            torch.stack([at.positions_BT, at.positions_BT, older_BT]),
            index_BS,
            torch.stack([own_BT, before_BT, inside_BT]),
            torch.stack([keys_BS, keys_BS, segments_BS]),
            self.head_dim**-0.5,
        )
        return self.wo(y_BTHV.flatten(2)), after
