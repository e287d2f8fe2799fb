"""Forget gates that cannot fall below a bound, learnt and rising from layer to layer: higher ones last longer.

f = b_l + (1 - b_l) sigmoid(z);  b_0 = 0,  b_l = b_{l-1} + (1 - b_{l-1}) sigmoid(r_l)

Layers of one width in a stack share the climb: each hands its bound up. The papers (arXiv 2311.04823, 2404.07904) have
cumsum(softmax(r)), which needs the numbers of higher layers; breaking the stick from below reaches the same bounds.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.span import Span
from models.stateful import Place


class ForgetGate(nn.Module):
    """Of `width` channels. Bounds start evenly spaced, l / layers, as softmax does from zeros."""

    def __init__(self, width: int, place: Place) -> None:
        super().__init__()
        self.name = f"forget_gate.{width}"
        if place.layer:
            self.rise = nn.Parameter(torch.full((width,), -math.log(place.layers - place.layer)))
        self.first = place.layer == 0

    def forward(self, z_BTD: Tensor, at: Span) -> tuple[Tensor, Tensor]:
        """log f and 1 - f, (B, T, D), fp32 at least and exact also where f is close to 0 or 1."""
        z_BTD = z_BTD.to(torch.promote_types(z_BTD.dtype, torch.float32))
        bound_11D = z_BTD.new_zeros(1, 1, z_BTD.shape[-1])
        if not self.first:
            below_11D = at.shared[self.name][:, :1] if self.name in at.shared else bound_11D  # none below in a hybrid
            bound_11D = below_11D + (1 - below_11D) * torch.sigmoid(self.rise.to(z_BTD.dtype))
        at.shared[self.name] = bound_11D.expand(-1, z_BTD.shape[1], -1)
        write_BTD = (1 - bound_11D) * torch.sigmoid(-z_BTD)
        return F.logsigmoid(z_BTD) if self.first else torch.log1p(-write_BTD), write_BTD
