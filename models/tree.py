"""A draft tree as the chains from its roots to its leaves: how parts run that know nothing of trees.

A token of a chain is what it would be in the tree, since only its ancestors stand before it. Nodes that several leaves
share are computed once for each of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import ancestors


@dataclass(frozen=True)
class Paths:
    """The L longest lines of a tree in each of B rows, of up to K tokens.

    columns_BLK: columns of each line from its root to its leaf, -1 behind its end; int64.
    place_BT: of each column one place in the L * K tokens of its row's lines.
    """

    columns_BLK: Tensor
    place_BT: Tensor

    def spread(self, x_BT: Tensor) -> Tensor:
        """What stands at each token of the lines, (B L, K, ...), of x (B or 1, T, ...)."""
        rows, lines, steps = self.columns_BLK.shape
        index_BX = self.columns_BLK.clamp(min=0).flatten(1)
        return gathered(x_BT.expand(rows, *x_BT.shape[1:]), index_BX).reshape(rows * lines, steps, *x_BT.shape[2:])

    def gather(self, y_RK: Tensor) -> Tensor:
        """The inverse: (B, T, ...) of y (B L or 1, K, ...)."""
        rows, lines, steps = self.columns_BLK.shape
        y_RK = y_RK.expand(rows * lines, *y_RK.shape[1:])
        return gathered(y_RK.reshape(rows, lines * steps, *y_RK.shape[2:]), self.place_BT)


def gathered(x_BS: Tensor, index_BN: Tensor) -> Tensor:
    """Columns (B, N, ...) of x (B, S, ...)."""
    return x_BS[torch.arange(len(x_BS), device=x_BS.device)[:, None], index_BN]


def depths(parents_BT: Tensor) -> Tensor:
    """Steps from the root of each column to it, (B, T) int64."""
    return ancestors(parents_BT).sum(2) - 1


def paths(parents_BT: Tensor, valid_BT: Tensor | None) -> Paths:
    """The lines of the trees that `parents_BT` (B, T) says, as of `Span`; valid: which columns are nodes, None: all."""
    reads_BTT = ancestors(parents_BT)
    valid_BT = torch.ones_like(parents_BT, dtype=torch.bool) if valid_BT is None else valid_BT
    depth_BT = torch.where(valid_BT, reads_BTT.sum(2) - 1, 0)
    parent_BT = torch.where(valid_BT, parents_BT, -1) + 1
    inner_BT = torch.zeros_like(valid_BT[:, :1]).repeat(1, valid_BT.shape[1] + 1).scatter(1, parent_BT, True)[:, 1:]
    leaf_BT = valid_BT & ~inner_BT
    lines, steps = max(1, int(leaf_BT.sum(1).max())), int(depth_BT.max()) + 1
    leaf_BL = torch.sort((~leaf_BT).long(), dim=1, stable=True).indices[:, :lines]
    on_BLT = gathered(reads_BTT, leaf_BL) & leaf_BT.gather(1, leaf_BL)[..., None]
    column_BLK = torch.sort((~on_BLT).long(), dim=2, stable=True).indices[..., :steps]  # a parent stands before it
    column_BLK = torch.where(on_BLT.gather(2, column_BLK), column_BLK, -1)
    return Paths(column_BLK, on_BLT.long().argmax(1) * steps + depth_BT)
