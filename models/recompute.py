"""Activation checkpointing: a block keeps its input alone, and computes the rest again in its backward pass.

What layers hand up the stack and the losses they add go into a block and come out of it as tensors, so that the second
run of the block reads what the first has read and gradients flow through them. torch's reentrant form is the one that
works under ZeRO-3: there a module's weights have to be gathered anew for the backward pass of the second run.
"""

from dataclasses import replace

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.span import Span


def recomputed(block: nn.Module, x_BTD: Tensor, at: Span) -> Tensor:
    """The output of `block(x_BTD, at)` (B, T, D) and its gradients, for the memory of `x_BTD`."""
    names, added, metrics = tuple(at.shared), (), at.metrics

    def run(x_BTD: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        nonlocal added, metrics
        before = dict(zip(names, values, strict=True))
        own = replace(at, shared=dict(before), losses=[], metrics=metrics)
        metrics = {}  # of the second run nobody reads any
        y_BTD, _ = block(x_BTD, own)
        added = tuple(name for name, value in own.shared.items() if value is not before.get(name))
        return y_BTD, *(own.shared[name] for name in added), *own.losses

    if not x_BTD.requires_grad:  # below it all is frozen; without this the block's own weights would get no gradient
        x_BTD = x_BTD.detach().requires_grad_()
    x_BTD, *values = checkpoint(run, x_BTD, *at.shared.values(), use_reentrant=True)
    at.shared.update(zip(added, values))
    at.losses.extend(values[len(added) :])
    return x_BTD
