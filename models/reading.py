"""What a part reads of a view itself, when no kernel reads it in place: the last entries at some tokens, or all."""

import torch
from torch import Tensor

from kernels.attention import View, slot_index


def recall(view: View, name: str, column_BM: Tensor, back: int) -> Tensor:
    """Of the document of each new token at `column_BM` the last `back` entries, with its own, oldest first.

    Returns (B, M, back, *shape) in the new entries' dtype, zero before the document's first token. What a window has
    dropped is not found.
    """
    new = view.new[name]
    rows, tokens = new.shape[:2]
    steps_N = torch.arange(1 - back, 1, device=new.device)
    length_B1 = column_BM.new_zeros(rows, 1) if view.length_B is None else view.length_B[:, None]
    if view.segments_BT is None:
        index_BMN = (column_BM + length_B1)[..., None] + steps_N
        column_BMN = column_BM[..., None] + steps_N
        first_BM = length_B1.expand_as(column_BM)
    else:
        real_BT = view.segments_BT >= 0
        order_BT = torch.sort((~real_BT).long(), dim=1, stable=True).indices  # columns of the real tokens, in order
        place_BM = (real_BT.long().cumsum(1) - 1).gather(1, column_BM)
        column_BMN = (place_BM[..., None] + steps_N).clamp(0, tokens - 1)
        column_BMN = order_BT.gather(1, column_BMN.flatten(1)).view_as(column_BMN)
        index_BMN = view.positions_BT.gather(1, column_BM)[..., None] + steps_N
        first_BM = length_B1 * (view.segments_BT.gather(1, column_BM) == 0)
    found = gather(new, column_BMN.clamp(min=0).flatten(1))
    if view.past:
        past, slot_BN = view.past[name], (index_BMN % view.capacity).flatten(1)
        if view.table_BN is None:
            older = gather(past, slot_BN)
        else:
            older = past[view.table_BN.gather(1, slot_BN // past.shape[1]), slot_BN % past.shape[1]]
        found = torch.where(beside((index_BMN >= first_BM[..., None]).flatten(1), new), found, older.to(new.dtype))
    found = torch.where(beside((index_BMN >= 0).flatten(1), new), found, 0)
    return found.unflatten(1, index_BMN.shape[1:])


def line(view: View, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """All a view shows of one name: [past | new] (B, S + T, *shape), index in its document and segment (B, S + T).

    Where there is nothing, in empty slots and at padding, entries are zero and the segment is -1. For parts that need
    every score at once; what kernels read they read in place.
    """
    new = view.new[name]
    rows, tokens = new.shape[:2]
    columns_BT = torch.arange(tokens, device=new.device).expand(rows, tokens)
    segments_BT = torch.zeros_like(columns_BT) if view.segments_BT is None else view.segments_BT
    index_BT = columns_BT if view.segments_BT is None else view.positions_BT
    if not view.past:
        return torch.where(beside(segments_BT >= 0, new), new, 0), index_BT, segments_BT
    if view.segments_BT is None:
        index_BT = columns_BT + view.length_B[:, None]
    past = view.past[name] if view.table_BN is None else view.past[name][view.table_BN].flatten(1, 2)
    slots_BS = slot_index(view.length_B, past.shape[1])
    index_BN = torch.cat([slots_BS, index_BT], 1)
    segments_BN = torch.cat([torch.where(slots_BS >= 0, 0, -1), segments_BT], 1)
    entries = torch.cat([past.to(new.dtype), new], 1)
    return torch.where(beside(segments_BN >= 0, new), entries, 0), index_BN, segments_BN


def gather(entries: Tensor, index_BN: Tensor) -> Tensor:
    """Entries (B, N, *shape) at places (B, N) of entries (B, S, *shape)."""
    return entries.gather(1, beside(index_BN, entries).expand(-1, -1, *entries.shape[2:]))


def beside(x_BN: Tensor, entries: Tensor) -> Tensor:
    """x with as many dimensions as entries (B, S, *shape)."""
    return x_BN.view(*x_BN.shape, *[1] * (entries.dim() - 2))
