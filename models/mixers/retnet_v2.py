"""Retention that is normalised while it accumulates, so what a head gives stays of size one however long it has run.

    S_t = g_h S_{t-1} + k_t v_t^T;  z_t = g_h z_{t-1} + k_t;  y_t = S_t^T q_t / max(|z_t . q_t|, n_t)
    n_t = sqrt(sum_{s <= t} g_h^(t-s)),  q / sqrt(K);  out = W_o (y silu(W_g x))

arXiv 2307.08621, section 2.4: scores divided by the root of the sum of their decays, then by max(|sum of scores|, 1).
One division does both, in chunks as in steps. The paper has these beside the group norm, which cancels them up to
rounding; here they take its place, so heads keep their size and nothing grows with the length in bf16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.mixers.retnet import RetNet
from models.span import Span
from models.state import State
from models.stateful import Place


class RetNetV2(RetNet):
    @dataclass(frozen=True)
    class Config(RetNet.Config):
        """As of retnet."""

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        heads, keys, values = self.size
        self.size = (heads, keys, values + 1)  # the last column sums the keys

    def retain(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, at: Span, state: State | None
    ) -> tuple[Tensor, State | None]:
        decay_H = self.decay(q_BTHK.device)
        count_BT1 = at.positions_BT[..., None] + 1
        floor_BTH = torch.sqrt(torch.expm1(count_BT1 * decay_H) / torch.expm1(decay_H))
        decay_BTH, scale = decay_H.expand_as(floor_BTH), self.head_dim**-0.5
        return self.remember(
            q_BTHK, k_BTHK, v_BTHV, decay_BTH, at, state, scale=scale, normalize=True, floor_BTH=floor_BTH
        )
