"""InfLLM-V2: dense attention for short contexts, for long ones the same weights read a few chosen blocks of keys.

    S_i = sum over the heads of a group of softmax_i(q . mean(k[i s : i s + l]) / sqrt(K))
    score_B = max_{i touches B} S_i;  I = the first blocks, the last ones, and the `selected` of largest score
    y = softmax attention over the tokens of I

arXiv 2509.24663. No parameter of its own, so a dense checkpoint (`gqa`) goes on as it is. Differs from the paper: a
token reads densely by its own position, below `dense`, and not by the length of the whole sequence, so that prefill and
decoding agree; the normaliser of S is exact, the paper approximates it from coarser means to save time.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kernels
from models.config import at_least
from models.layers.choice import Choice
from models.layers.compressed import Blocks, pick, room
from models.layers.grouped import Grouped
from models.span import Span
from models.state import State, TensorSpec, append
from models.stateful import Place


class InfLLMV2(Grouped):
    @dataclass(frozen=True)
    class Config(Grouped.Config):
        """As of gqa; and: block: tokens of a block. kernel, stride: tokens of a mean, from one to the next.

        initial, local, selected: blocks always read at the start, at the end with the token's own, and chosen.
        dense: tokens before this position read everything.
        """

        block: int = 64
        kernel: int = 32
        stride: int = 16
        initial: int = 1
        local: int = 32
        selected: int = 63
        dense: int = 8192

        @classmethod
        def tiny(cls) -> "InfLLMV2.Config":
            return cls(block=4, kernel=4, stride=2, local=1, selected=1, dense=13)

    def __init__(self, config: Config, place: Place) -> None:
        at_least(config, block=1, kernel=1, stride=1, local=1)
        c = config
        if c.kernel < c.stride or c.block % c.stride:
            raise ValueError(
                f"infllm_v2.stride={c.stride}: must divide block={c.block} and be at most kernel={c.kernel}"
            )
        super().__init__(config, place)
        self.means = Blocks(c.kernel, c.stride)
        self.choice = Choice()

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        spec = super().state_spec(max_len)
        c = self.options
        return {**spec, "mean": replace(spec["k"], every=c.stride, late=c.kernel - c.stride)}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.options
        q_BTHK, k_BTGK, v_BTGV = self.project(x_BTD, at)
        view, after = append(state, at, k=k_BTGK, v=v_BTGV)
        dense = room(view, at, 1) <= c.dense
        if state is not None or not dense:
            means, more = self.means.append(state, at, view, mean=(("k",), _mean))
            after = None if state is None else after | more
        if dense:
            y_BTHV = self.attend(q_BTHK, view)
        else:
            y_BTHV = kernels.block_sparse_attention(q_BTHK, view, self.blocks(q_BTHK, view, means, at), block=c.block)
        return self.wo(y_BTHV.flatten(2)), after

    def blocks(self, q_BTHK: Tensor, view: kernels.View, means: kernels.View, at: Span) -> Tensor:
        """The blocks each token reads, (B, T, G, N)."""
        c = self.options
        with torch.no_grad():
            weights, number_BN = self.means.weights(q_BTHK, means, "mean", at, self.head_dim**-0.5)
            score_BTGJ = _pooled(weights.sum(3), number_BN, c, room(view, at, c.block))
        blocks_BTGN = pick(
            self.choice, score_BTGJ, at, block=c.block, initial=c.initial, local=c.local, count=c.selected
        )
        if not c.dense:
            return blocks_BTGN
        every_N = torch.arange(-(-c.dense // c.block), device=q_BTHK.device)
        width = max(len(every_N), blocks_BTGN.shape[3])
        every_N, blocks_BTGN = (
            torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1) for x in (every_N, blocks_BTGN)
        )
        return torch.where((at.positions_BT < c.dense)[..., None, None], every_N, blocks_BTGN)


def _mean(k_BMNGK: Tensor) -> Tensor:
    return k_BMNGK.float().mean(2).to(k_BMNGK.dtype)


def _pooled(score_BTGN: Tensor, number_BN: Tensor, c: InfLLMV2.Config, blocks: int) -> Tensor:
    """The largest score of the means that touch each block, (B, T, G, J)."""
    first_BN = number_BN * c.stride // c.block
    last_BN = (number_BN * c.stride + c.kernel - 1) // c.block
    found = score_BTGN.new_zeros(*score_BTGN.shape[:3], blocks + 1)  # scores are positive; the last takes what is none
    for step in range((c.block + c.kernel - 2) // c.block + 1):
        block_BN = torch.where((number_BN >= 0) & (first_BN + step <= last_BN), first_BN + step, blocks)
        index = block_BN.clamp(max=blocks)[:, None, None].expand_as(score_BTGN)
        found = found.scatter_reduce(3, index, score_BTGN, "amax")
    return found[..., :blocks]
