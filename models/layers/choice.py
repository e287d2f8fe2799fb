"""The one place where numbers become decisions: experts of a token, blocks of keys, tokens of a layer.

A decision jumps where two scores meet, so rounding can change it, and with it everything after. Being a module, it can
be watched: tests replay decisions across dtypes, and tell a wrong path from a tie.
"""

import torch
from torch import Tensor, nn


class Choice(nn.Module):
    """The `count` largest scores of the last dimension."""

    def forward(self, scores: Tensor, count: int) -> Tensor:
        """Indices (..., count) int64 of the largest of scores (..., n), best first; of equal ones the first wins."""
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
