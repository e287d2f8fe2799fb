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
    """

    new: dict[str, Tensor]
    past: dict[str, Tensor]
    length_B: Tensor | None = None
    positions_BT: Tensor | None = None
    segments_BT: Tensor | None = None
    table_BN: Tensor | None = None

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
