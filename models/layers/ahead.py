"""Predicting further ahead than the next token: targets and token embeddings moved towards the past."""

import torch
from torch import Tensor

from models.span import Span


def later(values: Tensor, steps: int, fill: float = 0) -> Tensor:
    """What stands `steps` columns later, (B, T, ...) like `values`; `fill` past the end."""
    moved = values.roll(-steps, 1)
    moved[:, values.shape[1] - min(steps, values.shape[1]) :] = fill
    return moved


def targets_ahead(targets_BT: Tensor, at: Span, steps: int) -> Tensor:
    """The target of the token `steps` later in the same document, (B, T) int64; -100 where there is none."""
    moved_BT = later(targets_BT, steps, -100)
    if at.segments_BT is None:
        return moved_BT
    same_BT = (later(at.segments_BT, steps, -1) == at.segments_BT) & (at.segments_BT >= 0)
    return torch.where(same_BT, moved_BT, -100)


def mean(losses_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean over the tokens that have a target, a scalar."""
    return losses_BT.sum() / (targets_BT != -100).sum().clamp(min=1)
