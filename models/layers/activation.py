"""Activations by name, in the field's spelling."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # arXiv 2109.08668
}


def activate(x: Tensor, name: str) -> Tensor:
    """The activation of that name, elementwise."""
    return ACTIVATIONS[name](x)
