"""What routers share: scores in fp32, the choice of few among few, and how evenly tokens are spread."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.layers.choice import Choice
from models.span import Span


class Few(Choice):
    """The same choice by the routing kernel, for many rows of few scores."""

    def forward(self, scores: Tensor, count: int) -> Tensor:
        experts_Nk, _ = kernels.route(scores.detach().flatten(0, -2), count, normalize=False)
        return experts_Nk.unflatten(0, scores.shape[:-1])


def wide(router: nn.Linear, x: Tensor) -> Tensor:
    """Logits of a router in fp32 at least: a choice is only as good as the scores it compares."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if router.bias is None else router.bias.to(dtype)
    return F.linear(x.to(dtype), router.weight.to(dtype), bias)


def load(experts_BTk: Tensor, count: int, valid_BT: Tensor | None) -> Tensor:
    """How many choices of real tokens fell on each expert, (E,) fp32; a choice of `count` fell on none."""
    real_BTk = torch.ones_like(experts_BTk, dtype=torch.float32)
    if valid_BT is not None:
        real_BTk = real_BTk * valid_BT[..., None]
    found = real_BTk.new_zeros(count + 1)
    return found.scatter_add(0, experts_BTk.flatten(), real_BTk.flatten())[:count]


def balance(probabilities_BTE: Tensor, load_E: Tensor, at: Span, weight: float) -> None:
    """Add the loss E sum_e f_e P_e (arXiv 2101.03961), and log it with the router's entropy; padding does not count.

    f: choices of an expert for each token, from `load`, P: its mean probability. It is least, at the number of choices
    of a token, where both are even. Entropy is relative: 1 where a router has no opinion.
    """
    count = probabilities_BTE.shape[-1]
    valid_BT1 = torch.ones_like(probabilities_BTE[..., :1]) if at.valid_BT is None else at.valid_BT[..., None]
    tokens = valid_BT1.sum().clamp(min=1)
    mean_E = (probabilities_BTE * valid_BT1).flatten(0, 1).sum(0) / tokens
    loss = count * (load_E / tokens * mean_E).sum()
    if weight:
        at.losses.append(weight * loss)
    entropy = (torch.special.entr(probabilities_BTE.detach()) * valid_BT1).sum() / tokens / math.log(max(count, 2))
    at.log(balance=loss, entropy=entropy)
