"""What a query may read: this call's own entries, and the past ones wherever the caller keeps them.

A mixer never indexes its cache. It appends, receives a `View`, and hands that to a kernel, so contiguous or paged
memory and functional or in-place writes stay the caller's choice.

A past entry's slot is its index in the document modulo the capacity S. So after L tokens slot s holds index
`L-1 - (L-1-s) mod S`, and nothing where that is negative: one formula for a full cache, a window's ring and a row that
has just begun a new document (whose old entries thereby vanish without being cleared).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """Named entries of one layer. B rows, T tokens of this call, S past slots, P pages of Z slots, N blocks a row.

    new:          name -> (B, T, ...), this call's entries.
    past:         name -> (B, S, ...), or with `table_BN` a pool (P, Z, ...) that all rows share. Empty: no past.
    length_B:     tokens the carried document of each row had before this call, int64; None without a past.
    positions_BT: index of each new token in its document; None means length_B + 0, 1, 2, ...
    segments_BT:  0 the carried document, n the n-th begun in this call, -1 padding; None means all 0.
    table_BN:     page of each block of Z slots of a row, int64; page 0 takes the writes of padding, is never read.
    parents_BT:   column of each new token's parent in a draft tree, -1 at a root, int64; a parent stands before its
                  children, and a token reads the past, its ancestors and itself (arXiv 2401.10774). Segments are then
                  0 or -1, and positions given. None: no tree.
    """

    new: dict[str, Tensor]
    past: dict[str, Tensor]
    length_B: Tensor | None = None
    positions_BT: Tensor | None = None
    segments_BT: Tensor | None = None
    table_BN: Tensor | None = None
    parents_BT: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Past slots of a row."""
        if not self.past:
            return 0
        entry = next(iter(self.past.values()))
        return entry.shape[1] if self.table_BN is None else entry.shape[1] * self.table_BN.shape[1]


def slot_index(length_B: Tensor, capacity: int) -> Tensor:
    """Index in the document held by each of `capacity` slots, (B, S) int64; negative where the slot is empty."""
    last_B1 = length_B[:, None] - 1
    slots_S = torch.arange(capacity, device=length_B.device)
    return last_B1 - (last_B1 - slots_S) % capacity


def ancestors(parents_BT: Tensor) -> Tensor:
    """Which columns are each token or an ancestor of it, (B, T, T) bool; a parent stands before its children."""
    tokens = parents_BT.shape[1]
    columns_T = torch.arange(tokens, device=parents_BT.device)
    step = (columns_T == columns_T[:, None]) | (columns_T == parents_BT[..., None])
    for _ in range((tokens - 1).bit_length() if tokens else 0):  # paths of twice the length each time
        step = (step.float() @ step.float()) > 0
    return step


def seen(view: View, rows: int, tokens: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """How many tokens of its document each query reads, itself included, (B, T) int64."""
    segments_BT = view.segments_BT
    if segments_BT is None:
        segments_BT = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
    columns_T = torch.arange(tokens, device=device)
    length_B = columns_T.new_zeros(rows) if view.length_B is None or not view.past else view.length_B
    at_BT = view.positions_BT if view.positions_BT is not None else columns_T + length_B[:, None]
    # The first index of the document that is in the window and not yet written over.
    first_BT = (length_B[:, None] - view.capacity).clamp(min=0) * (segments_BT == 0)
    if window:
        first_BT = torch.maximum(first_BT, at_BT - window + 1)
    if causal:
        return (at_BT + 1 - first_BT).clamp(min=1)
    sizes_BN = torch.zeros(rows, tokens + 2, dtype=torch.int64, device=device)
    sizes_BN = sizes_BN.scatter_add(1, segments_BT + 1, torch.ones_like(segments_BT))
    sizes_BN = sizes_BN + length_B[:, None] * (torch.arange(tokens + 2, device=device) == 1)
    count_BT = sizes_BN.gather(1, segments_BT + 1)
    return (count_BT - first_BT).clamp(min=1)
