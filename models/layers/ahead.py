"""Predicting further ahead than the next token: targets and token embeddings moved towards the past."""

import torch
from torch import Tensor

from models.span import Span


def later(values: Tensor, at: Span, steps: int, fill: float = 0) -> Tensor:
    """What stands at the token `steps` later in the same document, (B, T, ...) like `values`; `fill` where none is."""
    tokens = values.shape[1]
    if at.segments_BT is None:
        moved = values.roll(-steps, 1)
        moved[:, tokens - min(steps, tokens) :] = fill
        return moved
    real_BT = at.segments_BT >= 0
    order_BT = torch.sort((~real_BT).long(), dim=1, stable=True).indices  # columns of the real tokens, in order
    place_BT = real_BT.long().cumsum(1) - 1 + steps
    column_BT = order_BT.gather(1, place_BT.clamp(max=tokens - 1))
    there_BT = real_BT & (place_BT < real_BT.sum(1, keepdim=True))
    there_BT = there_BT & (at.segments_BT.gather(1, column_BT) == at.segments_BT)
    column, there = (x.view(*x.shape, *[1] * (values.dim() - 2)) for x in (column_BT, there_BT))
    return torch.where(there, values.gather(1, column.expand_as(values)), fill)


def targets_ahead(targets_BT: Tensor, at: Span, steps: int) -> Tensor:
    """The target of the token `steps` later in the same document, (B, T) int64; -100 where there is none."""
    return later(targets_BT, at, steps, -100)


def mean(losses_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean over the tokens that have a target, a scalar."""
    return losses_BT.sum() / (targets_BT != -100).sum().clamp(min=1)
