"""Decode state: one flat dict of tensors with rows on dim 0, and what generic code does with it.

A value is one of three kinds. A plain `Tensor` is written functionally: a new dict comes back, the old one stays
good, gradients flow through it. `Pages` is a growing tensor in a pool that all rows share, written in place. `Kept`
holds a fixed-size tensor at several moments of the last call, from which `select` commits one per row.
Serving, RL and truncated BPTT use the functions below and know no architecture by name.
"""

from dataclasses import dataclass, replace
from math import ceil, prod

import torch
from torch import Tensor

from kernels.attention import View, slot_index
from models.span import Span

DRAFT = 32  # the longest run of tokens that can be rolled back; windowed state keeps that much more than its window


@dataclass(frozen=True)
class TensorSpec:
    """One named state tensor of one row.

    shape:  of one entry when it grows, of the whole otherwise.
    every:  0: fixed size; k: one entry for each k tokens.
    window: entries of a growing tensor that are ever read again, 0 for all of them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0
    every: int = 0
    window: int = 0

    def capacity(self, max_len: int) -> int:
        """Entries a row of `max_len` tokens needs."""
        entries = ceil(max_len / self.every)
        return min(entries, self.window + DRAFT) if self.window else entries

    def bytes(self, max_len: int) -> int:
        """Bytes of a row of `max_len` tokens."""
        return prod(self.shape) * self.dtype.itemsize * (self.capacity(max_len) if self.every else 1)

    def empty(self, rows: int, max_len: int, device=None) -> Tensor:
        """The state of `rows` fresh rows, contiguous: (rows, [capacity,] *shape)."""
        grown = (self.capacity(max_len),) if self.every else ()
        return torch.full((rows, *grown, *self.shape), self.fill, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Pages:
    """A growing tensor in pages: pool (P, Z, *shape), written in place; table_BN the pages of each row, int64.

    Page 0 belongs to nobody: padding is written there. `pending` are entries (B, T, *shape) and their pages and offsets
    (B, T), which wait until the kernels of the call have read what they replace.
    """

    pool: Tensor
    table_BN: Tensor
    pending: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.pool.shape[1] * self.table_BN.shape[1]


@dataclass(frozen=True)
class Kept:
    """A fixed-size tensor before the last k columns of a call and after each: (B, k+1, *shape)."""

    moments: Tensor


State = dict[str, Tensor | Pages | Kept]


def scope(state: State | None, prefix: str) -> State | None:
    """The part of `state` whose names begin with `prefix.`, without it."""
    if state is None:
        return None
    return {name[len(prefix) + 1 :]: value for name, value in state.items() if name.startswith(prefix + ".")}


def prefixed(prefix: str, part: dict) -> dict:
    """The inverse of `scope`."""
    return {f"{prefix}.{name}": value for name, value in part.items()}


def append(state: State | None, at: Span, **new: Tensor) -> tuple[View, State | None]:
    """Add this call's entries to growing state.

    new: name -> (B, T, *shape). Returns what a kernel may read (the past as it was before, and the new entries) and
    the state after. Padding is not written; when a document begins, only the row's last document stays.
    """
    positions_BT = None if at.segments_BT is None else at.positions_BT
    if state is None:
        return View(new, {}, None, positions_BT, at.segments_BT), None
    some = state[next(iter(new))]
    capacity = some.capacity if isinstance(some, Pages) else some.shape[1]
    write_BT, slot_BT = _slots(at, capacity)
    if isinstance(some, Pages):
        size, table_BN = some.pool.shape[1], some.table_BN
        page_BT = torch.where(write_BT, table_BN.gather(1, slot_BT // size), 0)
        past = {name: state[name].pool for name in new}
        after = {n: replace(state[n], pending=(entries, page_BT, slot_BT % size)) for n, entries in new.items()}
        return View(new, past, at.length_B, positions_BT, at.segments_BT, table_BN), after
    # Functional: for each slot the column that writes it, so that gradients flow to old and new entries alike.
    columns_BT = torch.arange(slot_BT.shape[1], device=slot_BT.device).expand_as(slot_BT)
    source_BS = torch.full((slot_BT.shape[0], capacity + 1), -1, device=slot_BT.device)
    source_BS = source_BS.scatter(1, torch.where(write_BT, slot_BT, capacity), columns_BT)[:, :capacity]
    after = {}
    for name, entries in new.items():
        old = state[name]
        found = _gather(entries.to(old.dtype), source_BS.clamp(min=0))
        after[name] = torch.where(_beside(source_BS >= 0, old), found, old)
    return View(new, {n: state[n] for n in new}, at.length_B, positions_BT, at.segments_BT), after


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
    found = _gather(new, column_BMN.clamp(min=0).flatten(1))
    if view.past:
        past, slot_BN = view.past[name], (index_BMN % view.capacity).flatten(1)
        if view.table_BN is None:
            older = _gather(past, slot_BN)
        else:
            older = past[view.table_BN.gather(1, slot_BN // past.shape[1]), slot_BN % past.shape[1]]
        found = torch.where(_beside((index_BMN >= first_BM[..., None]).flatten(1), new), found, older.to(new.dtype))
    found = torch.where(_beside((index_BMN >= 0).flatten(1), new), found, 0)
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
        return torch.where(_beside(segments_BT >= 0, new), new, 0), index_BT, segments_BT
    if view.segments_BT is None:
        index_BT = columns_BT + view.length_B[:, None]
    past = view.past[name] if view.table_BN is None else view.past[name][view.table_BN].flatten(1, 2)
    slots_BS = slot_index(view.length_B, past.shape[1])
    index_BN = torch.cat([slots_BS, index_BT], 1)
    segments_BN = torch.cat([torch.where(slots_BS >= 0, 0, -1), segments_BT], 1)
    entries = torch.cat([past.to(new.dtype), new], 1)
    return torch.where(_beside(segments_BN >= 0, new), entries, 0), index_BN, segments_BN


def _gather(entries: Tensor, index_BN: Tensor) -> Tensor:
    return entries.gather(1, _beside(index_BN, entries).expand(-1, -1, *entries.shape[2:]))


def _beside(x_BN: Tensor, entries: Tensor) -> Tensor:
    """x with as many dimensions as entries (B, S, *shape)."""
    return x_BN.view(*x_BN.shape, *[1] * (entries.dim() - 2))


def flush(state: State) -> State:
    """Write what `append` has left pending in pages; called once the part that appended has run."""
    after = {}
    for name, value in state.items():
        if isinstance(value, Pages) and value.pending is not None:
            entries, page_BT, offset_BT = value.pending
            value.pool[page_BT, offset_BT] = entries.to(value.pool.dtype)
            value = Pages(value.pool, value.table_BN)
        after[name] = value
    return after


def _slots(at: Span, capacity: int) -> tuple[Tensor, Tensor]:
    """Which columns are written, and to which slot: the last `capacity` tokens of each row's last document."""
    last_B1 = at.positions_BT[:, -1:]
    write_BT = torch.ones_like(at.positions_BT, dtype=torch.bool)
    if at.segments_BT is not None:
        write_BT = (at.segments_BT >= 0) & (at.segments_BT == at.segments_BT.max(1, keepdim=True).values)
        last_B1 = torch.where(write_BT, at.positions_BT, -1).max(1, keepdim=True).values
    return write_BT & (at.positions_BT > last_B1 - capacity), at.positions_BT % capacity


def take(state: State, rows_N: Tensor) -> State:
    """Rows `rows_N` of a state, in that order, also repeated; pages stay shared."""
    return {
        name: Pages(value.pool, value.table_BN[rows_N]) if isinstance(value, Pages) else value[rows_N]
        for name, value in state.items()
    }


def put(state: State, rows_N: Tensor, part: State) -> State:
    """`state` with its rows `rows_N` replaced by those of `part`."""
    after = {}
    for name, value in state.items():
        if isinstance(value, Pages):
            after[name] = Pages(value.pool, value.table_BN.index_copy(0, rows_N, part[name].table_BN))
        else:
            after[name] = value.index_copy(0, rows_N, part[name])
    return after


def fork(state: State, times: int) -> State:
    """Each row `times` times, the copies side by side, free to go on differently.

    Raises ValueError on pages: two rows must not write one page, so forking them is for the memory that owns the pool.
    """
    if any(isinstance(value, Pages) for value in state.values()):
        raise ValueError("fork: the state is paged; fork its rows through the memory that owns the pages")
    return {name: value.repeat_interleave(times, 0) for name, value in state.items()}


def snapshot(state: State) -> State:
    """A copy that later calls cannot change, also of what they write in place."""
    return {
        name: Pages(value.pool[value.table_BN], value.table_BN) if isinstance(value, Pages) else value.clone()
        for name, value in state.items()
    }


def restore(state: State, copy: State) -> State:
    """The state as it was when `copy = snapshot(state)` was taken; pages are written back in place."""
    after = {}
    for name, value in copy.items():
        if isinstance(value, Pages):
            state[name].pool[value.table_BN] = value.pool
            after[name] = Pages(state[name].pool, value.table_BN)
        else:
            after[name] = value.clone()
    return after


def select(state: State, n_B: Tensor) -> State:
    """Commit, row by row, the first `n_B` (0..k) of the last k columns of a call that asked `keep=k`.

    Growing entries past the committed length are left behind: the length hides them and later writes replace them.
    """
    rows_B = torch.arange(len(n_B), device=n_B.device)
    k = next((value.moments.shape[1] - 1 for value in state.values() if isinstance(value, Kept)), 0)
    if n_B.device.type == "cpu" and not torch.compiler.is_compiling() and ((n_B < 0) | (n_B > k)).any():
        raise ValueError(f"select: n_B={n_B.tolist()}, each must be from 0 to the {k} columns that were kept")
    return {name: value.moments[rows_B, n_B] if isinstance(value, Kept) else value for name, value in state.items()}


def bytes_per_row(spec: dict[str, TensorSpec], max_len: int) -> int:
    """Bytes a row of `max_len` tokens occupies."""
    return sum(tensor.bytes(max_len) for tensor in spec.values())


def bytes_per_token(spec: dict[str, TensorSpec]) -> float:
    """Bytes that each further token adds, once windows are full."""
    return sum(
        prod(tensor.shape) * tensor.dtype.itemsize / tensor.every
        for tensor in spec.values()
        if tensor.every and not tensor.window
    )
