"""Engram: a memory looked up by the last few token ids, gated by what the model is thinking. O(1), and prefetchable.

    e_t = concat over n = 2..order, heads of table[hash_n(x_t, ..., x_{t-n+1})]
    u_t = sigmoid(<RMSNorm(h_t), RMSNorm(W_k e_t)> / sqrt(D)) W_v e_t;   y = u + silu(conv(RMSNorm(u)))

arXiv 2601.07372. hash_n = XOR_j (x_{t-j} m_j) mod a prime, another prime for each table, odd multipliers m_j drawn for
each layer. The convolution is causal, 4 taps `order` apart, and starts at zero. Differs from the paper: one residual
stream, and token ids as they are (no folding of case and accents, which needs the tokenizer).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from models.layers.norm import RMSNorm
from models.span import Span
from models.state import State, TensorSpec
from models.stateful import Place, Stateful

TAPS = 4


class Engram(Stateful):
    family = "memory"
    keeps = True

    @dataclass(frozen=True)
    class Config:
        """order: longest n-gram. heads: tables for each n. rows: of a table, at least. width: of a row, 0: fits dim."""

        order: int = 3
        heads: int = 2
        rows: int = 128
        width: int = 0

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        if config.order < 2 or config.heads < 1 or config.rows < 2:
            raise ValueError(f"engram: order={config.order} >= 2, heads={config.heads} >= 1, rows={config.rows} >= 2")
        self.config = config
        tables = config.heads * (config.order - 1)
        width = config.width or max(1, place.dim // tables)
        sizes = _primes(config.rows, tables)
        generator = torch.Generator().manual_seed(10007 * place.layer)
        multipliers = torch.randint(1, 2**62 // max(place.vocab, 1), (config.order,), generator=generator) | 1
        self.register_buffer("multipliers", multipliers, persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        self.register_buffer("offsets", torch.tensor([0, *sizes[:-1]]).cumsum(0), persistent=False)
        self.table = nn.Embedding(sum(sizes), width)
        self.wk = nn.Linear(tables * width, place.dim, bias=False)
        self.wv = nn.Linear(tables * width, place.dim, bias=False)
        self.x_norm, self.k_norm, self.u_norm = (RMSNorm(place.dim, place.eps) for _ in range(3))
        self.conv = nn.Parameter(torch.zeros(place.dim, TAPS))

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        order, dim = self.config.order, self.conv.shape[0]
        return {
            "ids": TensorSpec((order - 1, order), torch.float32),
            "conv": TensorSpec(((TAPS - 1) * order, dim), self.conv.dtype),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        carried = state or {}
        grams_BTN, ids_tail = self._grams(at, carried.get("ids"))
        e_BTE = self.table(self._rows(grams_BTN)).flatten(2)
        gate_BT1 = (self.x_norm(x_BTD) * self.k_norm(self.wk(e_BTE))).sum(-1, keepdim=True) * x_BTD.shape[-1] ** -0.5
        u_BTD = gate_BT1.sigmoid() * self.wv(e_BTE)
        spread = self.conv.new_zeros(self.conv.shape[0], TAPS, self.config.order)
        taps_DW = torch.cat([self.conv[..., None], spread[..., 1:]], -1).flatten(1)[
            :, : (TAPS - 1) * self.config.order + 1
        ]
        y_BTD, conv_tail = kernels.conv1d(
            self.u_norm(u_BTD),
            taps_DW,
            activation="silu",
            state_BWD=carried.get("conv"),
            segments_BT=at.segments_BT,
            keep=at.keep,
        )
        return u_BTD + y_BTD, None if state is None else {"ids": ids_tail, "conv": conv_tail}

    def _grams(self, at: Span, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids of the last `order` tokens plus 1, 0 before the document's start, (B, T, order) int64; and the new tail.

        A convolution whose taps are one-hot is a shift that knows documents and padding. fp32 holds ids below 2^24.
        """
        if at.ids_BT is None:
            raise ValueError("engram: looks up token ids, and this model's inputs are not tokens; choose another ffn")
        order = self.config.order
        x_BTN = (at.ids_BT + 1).float()[..., None].expand(-1, -1, order).contiguous()
        one_hot = torch.eye(order, device=x_BTN.device).flip(1)
        y_BTN, tail = kernels.conv1d(x_BTN, one_hot, state_BWD=tail, segments_BT=at.segments_BT, keep=at.keep)
        return y_BTN.round().long(), tail

    def _rows(self, grams_BTN: Tensor) -> Tensor:
        """Row of each table, (B, T, tables)."""
        mixed_BTN, rows = grams_BTN * self.multipliers, []
        hashed_BT = mixed_BTN[..., 0]
        for n in range(1, self.config.order):
            hashed_BT = hashed_BT ^ mixed_BTN[..., n]
            rows += [hashed_BT] * self.config.heads
        return torch.stack(rows, -1) % self.sizes + self.offsets


def _primes(least: int, count: int) -> list[int]:
    """The first `count` primes from `least` on."""
    found, n = [], max(least, 2)
    while len(found) < count:
        if all(n % d for d in range(2, int(n**0.5) + 1)):
            found.append(n)
        n += 1
    return found
