"""Soft mixture of experts: experts read slots, each a weighted mean of all tokens, and every token reads all slots.

    L = X Phi;  slots = softmax_tokens(L)^T X;  y_t = sum_s softmax_slots(L_t)_s E(slots)_s

arXiv 2308.00951. No token is dropped, no expert idle, nothing is decided, so all is smooth. A slot sees the whole
document, later tokens too: it is for encoders and not causal. Documents of a row have slots of their own. As in the
paper tokens and Phi have length one in L, times a learnt scale.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import at_least
from models.layers.experts import Activation, Experts
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class SoftMoE(Stateful):
    family = "meta"
    causal = False

    @dataclass(frozen=True)
    class Config:
        """hidden: units of an expert, 0 means 4 dim. slots: of each expert for a document."""

        hidden: int = 0
        experts: int = 4
        slots: int = 2
        activation: Activation = "swiglu"

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, experts=1, slots=1)
        self.config = config
        self.phi = nn.Parameter(torch.randn(place.dim, config.experts * config.slots) * place.dim**-0.5)
        self.scale = nn.Parameter(torch.ones(()))
        hidden = config.hidden or 4 * place.dim
        self.experts = Experts(place.dim, hidden, config.experts, config.activation, place.layers)

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        x32_BTD = x_BTD.to(wide)
        logits_BTS = F.normalize(x32_BTD, dim=-1) @ (self.scale.to(wide) * F.normalize(self.phi.to(wide), dim=0))
        member_BTJ = self._documents(at, x_BTD)
        dispatch_BJTS = logits_BTS[:, None].expand(-1, member_BTJ.shape[-1], -1, -1)
        inside_BJT1 = member_BTJ.transpose(1, 2)[..., None]
        # The lowest number and not -inf: a document of no tokens would be NaN, and here it is left out by the mask.
        dispatch_BJTS = dispatch_BJTS.masked_fill(~inside_BJT1, torch.finfo(wide).min).softmax(2) * inside_BJT1
        slots_BJSD = torch.einsum("bjts,btd->bjsd", dispatch_BJTS, x32_BTD).to(x_BTD.dtype)
        y_BJSD = self._through_experts(slots_BJSD).to(wide)
        y_BTD = torch.einsum("btj,bts,bjsd->btd", member_BTJ.to(wide), logits_BTS.softmax(-1), y_BJSD)
        return y_BTD.to(x_BTD.dtype), state

    def _documents(self, at: Span, x_BTD: Tensor) -> Tensor:
        """Which tokens are of which document of the row, (B, T, J) bool."""
        if at.segments_BT is None:
            return torch.ones_like(x_BTD[..., :1], dtype=torch.bool)
        # A graph has one shape: as many documents as a row can hold.
        most = x_BTD.shape[1] if torch.compiler.is_compiling() else int(at.segments_BT.max().clamp(min=0))
        return at.segments_BT[..., None] == torch.arange(most + 1, device=x_BTD.device)

    def _through_experts(self, slots_BJSD: Tensor) -> Tensor:
        c = self.config
        by_expert = slots_BJSD.unflatten(2, (c.experts, c.slots)).permute(2, 0, 1, 3, 4)
        rows = by_expert[0].shape[:-1].numel()
        counts_E = torch.full((c.experts,), rows, device=slots_BJSD.device)
        y = self.experts.products(by_expert.flatten(0, 3), counts_E)
        return y.view_as(by_expert).permute(1, 2, 0, 3, 4).flatten(2, 3)
