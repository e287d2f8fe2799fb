"""Activation checkpointing: a block keeps its input alone, and computes the rest again in its backward pass.

What layers hand up the stack is copied before a block and after it, so that the second run of the block reads what the
first has read, also where the block itself, or one above it, has added something since.
"""

from dataclasses import replace

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.span import Span


def recomputed(block: nn.Module, x_BTD: Tensor, at: Span) -> Tensor:
    """The output of `block(x_BTD, at)` (B, T, D) and its gradients, for the memory of `x_BTD`."""
    before = dict(at.shared)

    def run(x_BTD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        own = replace(at, shared=dict(before))
        return block(x_BTD, own)[0], own.shared

    # Under ZeRO-3 a weight has its shape only while its module runs, so shapes cannot be compared afterwards; and the
    # module has to end as it began, so the second run is not broken off at the last tensor that is needed.
    x_BTD, shared = checkpoint(run, x_BTD, use_reentrant=False, determinism_check="none", early_stop=False)
    at.shared.update(shared)
    return x_BTD
