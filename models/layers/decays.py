"""Starting values of a decay -exp(log_decay) softplus(step + bias), as Mamba-2 and all that followed it draw them."""

import math

import torch
from torch import Tensor


def draw_log_decay(heads: int) -> Tensor:
    """log of U(1, 16), (heads,)."""
    return torch.empty(heads).uniform_(1, 16).log()


def draw_step_bias(size: int) -> Tensor:
    """softplus^-1 of a step drawn log-uniformly from 1e-3 to 1e-1, so that decay starts slow; (size,)."""
    step = torch.empty(size).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return step.expm1().log()
