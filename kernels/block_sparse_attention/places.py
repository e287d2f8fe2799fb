"""Where the tokens of a document's blocks stand.

Real tokens, taken in the order of their columns, are one document after the other: the place of a token among them is
`base` of its document plus its position, and `column` of a place leads back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """All int64. base, column None: places are columns, and positions are `known` + columns."""

    base_BT: Tensor | None
    column_BT: Tensor | None


def places(positions_BT: Tensor | None, segments_BT: Tensor | None) -> Places:
    """Of the new tokens of a call."""
    if segments_BT is None:
        return Places(None, None)
    real_BT = segments_BT >= 0
    place_BT = real_BT.long().cumsum(1) - 1
    return Places(place_BT - positions_BT, torch.sort((~real_BT).long(), dim=1, stable=True).indices)


def positions(segments_BT: Tensor, length_B: Tensor | None) -> Tensor:
    """Index of each token in its document, from segment numbers alone; (B, T) int64, anything at padding."""
    real_BT = segments_BT >= 0
    place_BT = real_BT.long().cumsum(1) - 1
    first_BN = torch.full((segments_BT.shape[0], segments_BT.shape[1] + 2), segments_BT.shape[1] + 1).to(segments_BT)
    first_BN = first_BN.scatter_reduce(1, segments_BT + 1, place_BT, "amin")
    found_BT = place_BT - first_BN.gather(1, segments_BT + 1)
    if length_B is not None:
        found_BT = found_BT + (segments_BT == 0) * length_B[:, None]
    return found_BT


def once(blocks: Tensor) -> Tensor:
    """Each number of the last dimension once, the others -1."""
    if blocks.shape[-1] < 2:
        return blocks
    blocks = blocks.sort(-1).values
    again = torch.zeros_like(blocks, dtype=torch.bool)
    again[..., 1:] = blocks[..., 1:] == blocks[..., :-1]
    return blocks.masked_fill(again, -1)
