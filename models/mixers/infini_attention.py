"""Infini-attention: exact attention inside a segment, and for all segments before it one compressive memory per head.

    y_t = g m_t + (1 - g) softmax attention over the tokens of t's segment up to t,   g = sigmoid(b), one for each head
    m_t = f(q_t) M / (f(q_t) . z),   M = sum f(k_j) v_j^T,  z = sum f(k_j)  over the segments before t's,  f = elu + 1

arXiv 2404.07143. A segment is written once it is full, so a query reads before its own segment's keys come in. Memory
has no positions; before the second segment it is empty and gives zero. The linear update; no delta rule.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.config import at_least, parse_part
from models.layers.chunked import by_parity
from models.layers.matrix_memory import MatrixMemory
from models.span import Span
from models.state import State, TensorSpec, append
from models.stateful import Place


class InfiniAttention(MatrixMemory):
    keeps = False  # a row's columns close its segments at times of their own

    @dataclass(frozen=True)
    class Config:
        """segment: tokens of one, and of the cache. positions: a scheme of models/positions, inside segments."""

        heads: int = 4
        segment: int = 2048
        positions: str = "rope"

        @classmethod
        def tiny(cls) -> "InfiniAttention.Config":
            return cls(segment=8)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        at_least(config, segment=1)
        self.size = (config.heads, self.head_dim, self.head_dim + 1)  # the last column is z
        positions, positions_config = parse_part(config.positions, "position")
        self.positions = positions(positions_config, self.head_dim, config.heads, place)
        self.wqkv = nn.Linear(place.dim, 3 * place.dim, bias=False)
        self.mix = nn.Parameter(torch.zeros(config.heads))
        self.wo = nn.Linear(place.dim, place.dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        """closed: the memory; open: what the segment begun so far will add to it; k, v: that segment's tokens."""
        dtype, window = self.wo.weight.dtype, self.config.segment
        return {
            "closed": TensorSpec(self.size, torch.float32),
            "open": TensorSpec(self.size, torch.float32),
            "k": TensorSpec((self.heads, self.head_dim + 2), dtype, every=1, window=window),
            "v": TensorSpec((self.heads, self.head_dim), dtype, every=1, window=window),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        q_BTHK, k_BTHK, v_BTHV = map(self.by_head, self.wqkv(x_BTD).chunk(3, -1))
        memory_BTHV, matrices = self._recall(q_BTHK, k_BTHK, v_BTHV, at, state)
        local_BTHV, recent = self._attend(q_BTHK, k_BTHK, v_BTHV, at, state)
        mix_H1 = self.mix.to(memory_BTHV.dtype).sigmoid()[:, None]
        y_BTHV = (mix_H1 * memory_BTHV + (1 - mix_H1) * local_BTHV).to(x_BTD.dtype)
        return self.wo(y_BTHV.flatten(2)), None if state is None else matrices | recent

    def _attend(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, at: Span, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Softmax attention inside the segment."""
        q_BTHK, k_BTHK = self.positions.query(q_BTHK, at), self.positions.key(k_BTHK, at)
        q_BTHK, k_BTHK = by_parity(q_BTHK, k_BTHK, at, self.config.segment)
        view, recent = append(state, at, k=k_BTHK, v=v_BTHV)
        options = {"window": self.config.segment, "slopes_H": self.positions.slopes_H}
        return kernels.attention(q_BTHK, view, scale=self.head_dim**-0.5, **options), recent

    def _recall(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, at: Span, state: State | None
    ) -> tuple[Tensor, State | None]:
        """What the segments before tell, fp32 at least.

        Linear attention over a line of queries and keys apart, in which each segment's queries come before its keys.
        Nobody reads the row's last segment yet, so it goes to `open` instead, and from there to `closed` when it is
        over.
        """
        wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        q_BTHK, k_BTHK = F.elu(q_BTHK.to(wide)) + 1, F.elu(k_BTHK.to(wide)) + 1
        v_BTHV = F.pad(v_BTHV.to(wide), (0, 1), value=1.0)
        tokens, segments_BT = q_BTHK.shape[1], at.segments_BT
        real_BT = torch.ones_like(at.positions_BT, dtype=torch.bool) if segments_BT is None else at.valid_BT
        number_BT = (real_BT & (at.positions_BT % self.config.segment == 0)).long().cumsum(1)  # 0: carried in
        last_BT = number_BT == number_BT[:, -1:]

        order_BL = torch.cat([2 * number_BT, 2 * number_BT + 1], 1).argsort(dim=1, stable=True)
        place_BT = order_BL.argsort(1)[:, :tokens]  # of each query in the line

        def line(of_query_BTHK: Tensor, of_key_BTHK: Tensor) -> Tensor:
            return _at(torch.cat([of_query_BTHK, of_key_BTHK], 1), order_BL)

        closing_BTHK = k_BTHK.masked_fill(last_BT[..., None, None], 0)
        y_BLHV, closed = kernels.linear_attention(
            line(q_BTHK, torch.zeros_like(q_BTHK)),
            line(torch.zeros_like(k_BTHK), closing_BTHK),
            line(torch.zeros_like(v_BTHV), v_BTHV),
            state_BHKV=None if state is None else state["closed"],
            segments_BT=None if segments_BT is None else torch.cat([segments_BT] * 2, 1).gather(1, order_BL),
        )
        y_BTHV = _at(y_BLHV, place_BT)
        if state is not None:
            carried_BT = torch.ones_like(real_BT) if segments_BT is None else segments_BT <= 0
            later_BT = carried_BT & (number_BT > 0)
            y_BTHV = y_BTHV + torch.einsum(
                "bthk,bhkv->bthv", q_BTHK.masked_fill(~later_BT[..., None, None], 0), state["open"].to(wide)
            )
            still_B111 = (number_BT[:, -1] == 0)[:, None, None, None]
            over_B111 = carried_BT.all(1)[:, None, None, None] & ~still_B111
            opening_BTHK = k_BTHK.masked_fill(~(last_BT & real_BT)[..., None, None], 0)
            opened = torch.einsum("bthk,bthv->bhkv", opening_BTHK, v_BTHV)
            state = {
                "closed": closed + torch.where(over_B111, state["open"], 0),
                "open": opened + torch.where(still_B111, state["open"], 0),
            }
        y_BTHV, sum_BTH1 = y_BTHV.split([self.head_dim, 1], -1)
        empty_BTH1 = sum_BTH1 == 0
        return torch.where(empty_BTH1, 0, y_BTHV / torch.where(empty_BTH1, 1, sum_BTH1)), state


def _at(x_BTHK: Tensor, columns_BL: Tensor) -> Tensor:
    """The given columns of each row, (B, L, H, K)."""
    return x_BTHK.gather(1, columns_BL[..., None, None].expand(-1, -1, *x_BTHK.shape[2:]))
