"""Native sparse attention: each token reads a summary of everything, a few blocks exactly, and its neighbourhood.

    y = g_c Attn(q, phi(K_c), phi(V_c)) + g_s Attn(q, the blocks of K_s, V_s with most weight) + g_w Attn(q, window)
    p_B = sum over the heads of a group and the summaries i of p_i |i overlaps B| / stride,   g = sigmoid(W_g x)

arXiv 2502.11089. Each branch has keys and values of its own. phi is an MLP over the `size` tokens of overlapping
pieces, told their places by a learnt embedding, or their mean. The paper does not give its width: here one hidden layer
of a head's. Summaries are read without rotary positions, which the other branches have. The paper's formula of p_B
counts the overlaps backwards from a block's first token, which is read as a slip.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.config import at_least, parse_part
from models.layers import compressed
from models.layers.choice import Choice
from models.reading import line
from models.span import Span
from models.state import State, TensorSpec, append
from models.stateful import Place, Stateful


class NSA(Stateful):
    family = "attention"
    keeps = True  # nothing of fixed size to keep

    @dataclass(frozen=True)
    class Config:
        """head_dim: 0 means dim / heads. size, stride: tokens of a summary, from one to the next; summary: what it is.

        block: tokens of a block that is read exactly. selected: how many a token reads, `initial` at the start and
        `local` at the end, its own with them, among them. window: tokens of the neighbourhood.
        """

        heads: int = 4
        kv_heads: int = 2
        head_dim: int = 0
        size: int = 32
        stride: int = 16
        summary: Literal["mlp", "mean"] = "mlp"
        block: int = 64
        selected: int = 16
        initial: int = 1
        local: int = 2
        window: int = 512
        positions: str = "rope"

        @classmethod
        def tiny(cls) -> "NSA.Config":
            return cls(size=4, stride=2, block=4, selected=4, window=4)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1, kv_heads=1, stride=1, block=1, local=1, window=1)
        c = self.config = config
        if c.heads % c.kv_heads:
            raise ValueError(f"nsa: heads={c.heads} must be a multiple of kv_heads={c.kv_heads}")
        if not c.head_dim and place.dim % c.heads:
            raise ValueError(f"nsa: dim={place.dim} must be a multiple of heads={c.heads}, or give head_dim")
        if c.size < c.stride:
            raise ValueError(f"nsa.size={c.size}: must be at least stride={c.stride}, or tokens are left out")
        if c.selected < c.initial + c.local:
            raise ValueError(f"nsa.selected={c.selected}: must be at least initial + local = {c.initial + c.local}")
        self.head_dim = c.head_dim or place.dim // c.heads
        positions, positions_config = parse_part(c.positions, "position")
        self.positions = positions(positions_config, self.head_dim, c.heads, place)
        if self.positions.slopes_H is not None:
            raise ValueError(f"nsa.positions={c.positions!r}: blocks are read without a bias by distance")
        self.wq = nn.Linear(place.dim, c.heads * self.head_dim, bias=False)
        self.wkv = nn.Linear(place.dim, 6 * c.kv_heads * self.head_dim, bias=False)  # k, v: summary, blocks, window
        self.wgate = nn.Linear(place.dim, 3 * c.heads, bias=False)
        self.wo = nn.Linear(c.heads * self.head_dim, place.dim, bias=False)
        if c.summary == "mlp":
            self.k_summary, self.v_summary = (Summary(c.size, self.head_dim) for _ in "kv")
        else:
            self.k_summary, self.v_summary = Mean(), Mean()
        self.cut = compressed.Blocks(c.size, c.stride)
        self.choice = Choice()

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        c, shape, dtype = self.config, (self.config.kv_heads, self.head_dim), self.wo.weight.dtype
        each = {
            "open": TensorSpec(shape, dtype, every=1, window=c.size),  # what the next summaries are made of
            "summary": TensorSpec(shape, dtype, every=c.stride, late=c.size - c.stride),
            "block": TensorSpec(shape, dtype, every=1),
            "near": TensorSpec(shape, dtype, every=1, window=c.window),
        }
        return {f"{name}_{kind}": spec for name, spec in each.items() for kind in "kv"}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.config
        plain_BTHK = self.wq(x_BTD).unflatten(-1, (c.heads, self.head_dim))
        turned_BTHK = self.positions.query(plain_BTHK, at)
        pairs = self.wkv(x_BTD).unflatten(-1, (6, c.kv_heads, self.head_dim)).unbind(2)
        k_BTGK, block_BTGK, near_BTGK, *values = pairs
        names = {"open": k_BTGK, "block": self.positions.key(block_BTGK, at), "near": self.positions.key(near_BTGK, at)}
        views, after = {}, {}
        for (name, keys), v_BTGV in zip(names.items(), values, strict=True):
            views[name], part = append(state, at, **{f"{name}_k": keys, f"{name}_v": v_BTGV})
            after |= part or {}
        summaries, part = self.cut.append(
            state,
            at,
            views["open"],
            summary_k=(("open_k",), self.k_summary),
            summary_v=(("open_v",), self.v_summary),
        )
        after |= part or {}
        block, near = (_named(views[name], name) for name in ("block", "near"))
        weights, number_BN = self.cut.weights(plain_BTHK, summaries, "summary_k", at, self.head_dim**-0.5)
        blocks_BTGN = self.blocks(weights, number_BN, at, compressed.room(block, at, c.block))
        branches = (
            compressed.values(weights, line(summaries, "summary_v")[0]).to(x_BTD.dtype),
            kernels.block_sparse_attention(turned_BTHK, block, blocks_BTGN, block=c.block),
            kernels.attention(turned_BTHK, near, window=c.window),
        )
        gates = self.wgate(x_BTD).float().sigmoid().to(x_BTD.dtype).unflatten(-1, (3, c.heads, 1)).unbind(2)
        y_BTHV = sum(gate * branch for gate, branch in zip(gates, branches, strict=True))
        return self.wo(y_BTHV.flatten(2)), None if state is None else after

    def blocks(self, weights: Tensor, number_BN: Tensor, at: Span, count: int) -> Tensor:
        """The blocks each token reads exactly, (B, T, G, N), by the weights of the summaries that overlap them."""
        c = self.config
        start_BN1 = (number_BN * c.stride)[..., None]
        begin_J = torch.arange(count, device=weights.device) * c.block
        overlap_BNJ = torch.minimum(start_BN1 + c.size, begin_J + c.block) - torch.maximum(start_BN1, begin_J)
        overlap_BNJ = (overlap_BNJ.clamp(min=0) * (number_BN >= 0)[..., None]).to(weights.dtype) / c.stride
        shared_BTGN = weights.detach().sum(3)
        score_BTGJ = (shared_BTGN.flatten(1, 2) @ overlap_BNJ).view(*shared_BTGN.shape[:3], count)
        count = c.selected - c.initial - c.local
        return compressed.pick(
            self.choice, score_BTGJ, at, block=c.block, initial=c.initial, local=c.local, count=count
        )


class Summary(nn.Module):
    """One entry for the tokens of a block: an MLP over all of them, each head's apart, with the same weights."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(size, dim) * dim**-0.5)
        self.wi = nn.Linear(size * dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BMNGK: Tensor) -> Tensor:
        x_BMGNK = (x_BMNGK.transpose(2, 3) + self.places).flatten(3)
        return self.out(F.silu(self.wi(x_BMGNK)))


class Mean(nn.Module):
    """One entry for the tokens of a block: their mean."""

    def forward(self, x_BMNGK: Tensor) -> Tensor:
        return x_BMNGK.float().mean(2).to(x_BMNGK.dtype)


def _named(view: kernels.View, name: str) -> kernels.View:
    """The view's `name`_k and `name`_v as k and v."""
    new, past = ({kind: side[f"{name}_{kind}"] for kind in "kv"} if side else {} for side in (view.new, view.past))
    return kernels.View(new, past, view.length_B, view.positions_BT, view.segments_BT, view.table_BN)
