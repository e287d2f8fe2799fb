"""SPLA: softmax attention over a few chosen blocks, linear attention over everything else, so nothing is dropped.

    s_B = q.mean(k_B) + 1/2 q^T var(k_B) q   (mean exp(q.k) of a block, to second order, in logs; q over sqrt(K))
    y_h = Attn(q, chosen blocks) + w_h rms(r);   r = phi(q) (sum_i phi(k_i) v_i^T - the same over the chosen blocks)

arXiv 2601.22379, which has no code. Shares of exp(s_B) are summed over the heads of a group, so all choose alike; the
first and the last blocks are always read. phi is the softmax over a head's channels and r has no divisor, as in
RAttention (2506.15545) by the same author. Variances are kept by channel. Differs from there: the exact branch is not
normalised, so that with all blocks chosen the output is dense attention's, bit for bit of its maths.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import kernels
from models.config import at_least
from models.layers.choice import Choice
from models.layers.compressed import Blocks, pick, room
from models.layers.grouped import Grouped
from models.span import Span
from models.state import State, TensorSpec, append
from models.stateful import Place


class SPLA(Grouped):
    @dataclass(frozen=True)
    class Config(Grouped.Config):
        """As of gqa; and: block: tokens of a block. initial, local, selected: blocks that are read exactly, at the
        start, at the end with the token's own, and chosen."""

        block: int = 64
        initial: int = 1
        local: int = 2
        selected: int = 13

        @classmethod
        def tiny(cls) -> "SPLA.Config":
            return cls(block=4, local=1, selected=1)

    def __init__(self, config: Config, place: Place) -> None:
        at_least(config, block=1, local=1)
        super().__init__(config, place)
        self.eps = place.eps
        self.rest = nn.Parameter(torch.ones(config.heads, self.head_dim))  # w
        self.cut = Blocks(config.block, config.block)
        self.choice = Choice()

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        spec, (groups, size) = super().state_spec(max_len), (self.config.kv_heads, self.head_dim)
        return {
            **spec,
            "feature": spec["k"],  # phi(k); made again from k it would cost a pass over the cache at each step
            "moments": TensorSpec((groups, 2 * size), torch.float32, every=self.options.block),
            "sum": TensorSpec((groups, size, size), torch.float32),
        }

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.options
        q_BTHK, k_BTGK, v_BTGV = self.project(x_BTD, at)
        feature_BTGK = k_BTGK.float().softmax(-1).to(k_BTGK.dtype)
        view, after = append(state, at, k=k_BTGK, v=v_BTGV, feature=feature_BTGK)
        moments, part = self.cut.append(state, at, view, moments=(("k",), moments_of))
        blocks_BTGN = self.blocks(q_BTHK, moments, at, room(view, at, c.block))
        y_BTHV = kernels.block_sparse_attention(q_BTHK, view, blocks_BTGN, block=c.block)
        # The difference is taken in fp32, from the same rounded features on both sides.
        q_BTHK, wide = q_BTHK.float().softmax(-1), {"k": feature_BTGK.float(), "v": v_BTGV.float()}
        past = {"k": view.past["feature"], "v": view.past["v"]} if view.past else {}
        view = replace(view, new=wide, past=past)
        chosen_BTHV = kernels.block_sparse_attention(q_BTHK, view, blocks_BTGN, block=c.block, scale=1.0, linear=True)
        all_BTHV, total = self.all(q_BTHK, wide, at, None if state is None else state["sum"])
        others_BT = at.positions_BT // c.block + 1 - c.local - c.initial > c.selected
        rest_BTHV = (all_BTHV - chosen_BTHV) * others_BT[..., None, None]  # rounding alone must not be normalised
        rest_BTHV = rest_BTHV * torch.rsqrt(rest_BTHV.square().mean(-1, keepdim=True) + self.eps) * self.rest.float()
        y_BTHV = y_BTHV + rest_BTHV.to(y_BTHV.dtype)
        return self.wo(y_BTHV.flatten(2)), None if state is None else {**after, **part, "sum": total}

    def blocks(self, q_BTHK: Tensor, moments: kernels.View, at: Span, count: int) -> Tensor:
        """The blocks each token reads exactly, (B, T, G, N)."""
        c = self.options
        with torch.no_grad():
            q_BTHK = q_BTHK.float() * self.head_dim**-0.5
            both_BTHK = torch.cat([q_BTHK, q_BTHK.square() / 2], -1)
            weights, number_BN = self.cut.weights(both_BTHK, moments, "moments", at, 1.0)
            shared_BTGN = weights.sum(3)
            index = number_BN.clamp(0, count - 1)[:, None, None].expand_as(shared_BTGN)
            score_BTGJ = shared_BTGN.new_zeros(*shared_BTGN.shape[:3], count).scatter_add(3, index, shared_BTGN)
        return pick(self.choice, score_BTGJ, at, block=c.block, initial=c.initial, local=c.local, count=c.selected)

    def all(self, q_BTHK: Tensor, new: dict, at: Span, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Linear attention over all tokens; the heads of a group share one state."""
        y_RBTGV, states = zip(
            *(
                kernels.linear_attention(
                    q_BTGK, new["k"], new["v"], state_BHKV=state, segments_BT=at.segments_BT, keep=at.keep
                )
                for q_BTGK in q_BTHK.unflatten(2, (self.config.kv_heads, -1)).unbind(3)
            ),
            strict=True,
        )
        return torch.stack(y_RBTGV, 3).flatten(2, 3), states[0]


def moments_of(k_BMNGK: Tensor) -> Tensor:
    """Mean and variance of a block's keys by channel, (B, M, G, 2 K) fp32."""
    variance, mean = torch.var_mean(k_BMNGK.float(), 2, correction=0)
    return torch.cat([mean, variance], -1)
