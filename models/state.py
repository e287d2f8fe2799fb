"""Decode state: one flat dict of tensors with rows on dim 0, and what generic code does with it.

A value is one of four kinds. A plain `Tensor` is written functionally: a new dict comes back, the old one stays
good, gradients flow through it. `Pages` is a growing tensor in a pool that all rows share, written in place. `Kept`
holds a fixed-size tensor at several moments of the last call, from which `select` commits one per row; after a call
with a draft tree `Drafted` holds a growing one and what it may be given.
Serving, RL and truncated BPTT use the functions below and know no architecture by name.
"""

from dataclasses import dataclass, replace
from math import ceil, prod

import torch
from torch import Tensor

from kernels.attention import View
from models.reading import beside, gather
from models.span import Span
from models.tree import Paths

DRAFT = 32  # the longest run of tokens that can be rolled back; windowed state keeps that much more than its window


@dataclass(frozen=True)
class TensorSpec:
    """One named state tensor of one row.

    shape:  of one entry when it grows, of the whole otherwise.
    every:  0: fixed size; k: one entry for each k tokens.
    window: entries of a growing tensor that are ever read again, 0 for all of them.
    late:   tokens that may still come before the entry of the last `every` ones is written, -1 for any number.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0
    every: int = 0
    window: int = 0
    late: int = 0

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
    """A growing tensor in pages: pool (P, Z, *shape), written in place; table_BN the pages of each row, int64, the same
    for tensors that are appended together.

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
    """A fixed-size tensor before the last k columns of a call and after each: (B, k+1, *shape).

    paths: the rows are the lines of a draft tree, (B L, k+1, *shape).
    """

    moments: Tensor
    paths: Paths | None = None


@dataclass(frozen=True)
class Drafted:
    """A growing tensor as it was before a call of guesses, and entries (B, T, *shape) of which some will be written.

    slot_BT, write_BT: where, and whether there is one. paths: the rows of these three are the lines of a draft tree.
    """

    value: Tensor | Pages
    entries: Tensor
    slot_BT: Tensor
    write_BT: Tensor
    paths: Paths | None = None

    @classmethod
    def joined(cls, steps: "list[Drafted]") -> "Drafted":
        """Several calls as one."""
        parts = ([getattr(step, name) for step in steps] for name in ("entries", "slot_BT", "write_BT"))
        return cls(steps[0].value, *(torch.cat(part, 1) for part in parts))


State = dict[str, Tensor | Pages | Kept | Drafted]


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
    positions_BT = None if at.segments_BT is None and at.parents_BT is None else at.positions_BT
    if state is None:
        return View(new, {}, None, positions_BT, at.segments_BT), None
    some = state[next(iter(new))]
    paged = isinstance(some, Pages)
    write_BT, slot_BT = _slots(at, some.capacity if paged else some.shape[1])
    past = {name: state[name].pool if paged else state[name] for name in new}
    table_BN = some.table_BN if paged else None
    view = View(new, past, at.length_B, positions_BT, at.segments_BT, table_BN, at.parents_BT)
    if at.drafts:
        return view, {name: Drafted(state[name], entries, slot_BT, write_BT) for name, entries in new.items()}
    if paged:
        page_BT, offset_BT = _page(some, slot_BT, write_BT)
        return view, {n: replace(state[n], pending=(entries, page_BT, offset_BT)) for n, entries in new.items()}
    source_BS = _source(some.shape[1], slot_BT, write_BT)
    return view, {name: _replaced(state[name], source_BS, entries) for name, entries in new.items()}


def _page(pages: Pages, slot_BT: Tensor, write_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Page and offset of each slot; page 0 where nothing is to be written."""
    size = pages.pool.shape[1]
    return torch.where(write_BT, pages.table_BN.gather(1, slot_BT // size), 0), slot_BT % size


def _source(capacity: int, slot_BT: Tensor, write_BT: Tensor) -> Tensor:
    """For each slot the column that writes it, (B, S); -1 for none."""
    columns_BT = torch.arange(slot_BT.shape[1], device=slot_BT.device).expand_as(slot_BT)
    source_BS = torch.full((slot_BT.shape[0], capacity + 1), -1, device=slot_BT.device)
    return source_BS.scatter(1, torch.where(write_BT, slot_BT, capacity), columns_BT)[:, :capacity]


def _replaced(old: Tensor, source_BS: Tensor, entries: Tensor) -> Tensor:
    """Functional, so that gradients flow to old and new entries alike."""
    found = gather(entries.to(old.dtype), source_BS.clamp(min=0))
    return torch.where(beside(source_BS >= 0, old), found, old)


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
    if at.parents_BT is not None:  # no longer than what windows keep beside what they read
        return write_BT if at.segments_BT is None else at.segments_BT >= 0, at.positions_BT % capacity
    if at.segments_BT is not None:
        write_BT = (at.segments_BT >= 0) & (at.segments_BT == at.segments_BT.max(1, keepdim=True).values)
        last_B1 = torch.where(write_BT, at.positions_BT, -1).max(1, keepdim=True).values
    return write_BT & (at.positions_BT > last_B1 - capacity), at.positions_BT % capacity


def along(state: State, lines: Paths, fixed: set[str]) -> State:
    """The state of each row once for each line of its draft tree; what grows is shared, in pages, to be read only."""
    rows, times, _ = lines.columns_BLK.shape
    rows_R1 = torch.arange(rows, device=lines.columns_BLK.device)[:, None].repeat_interleave(times, 0)
    after = {}
    for name, value in state.items():
        if isinstance(value, Pages):
            after[name] = Pages(value.pool, value.table_BN.repeat_interleave(times, 0))
        else:  # a row that grows is a page
            after[name] = value.repeat_interleave(times, 0) if name in fixed else Pages(value, rows_R1)
    return after


def owned(state: State) -> State:
    """The state with memory of its own, contiguous."""
    return {
        name: value.pool[value.table_BN].flatten(1, 2) if isinstance(value, Pages) else value
        for name, value in state.items()
    }


def written(state: State) -> State:
    """The state with all guesses taken for true; it is contiguous."""
    after = {}
    for name, value in state.items():
        if isinstance(value, Drafted):
            value = _replaced(value.value, _source(value.value.shape[1], value.slot_BT, value.write_BT), value.entries)
        after[name] = value
    return after


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


def select(state: State, n_B: Tensor, path_BK: Tensor | None = None) -> State:
    """Commit, row by row, the first `n_B` (0..k) of the last k columns of a call that asked `keep=k`.

    After a call with a draft tree: the tokens at the first `n_B` columns of `path_BK` (int64), which begins at a root
    and goes from parent to child. Growing entries past the committed length may stay behind: the length hides them and
    later writes replace them.
    """
    rows_B = torch.arange(len(n_B), device=n_B.device)
    k = next((value.moments.shape[1] - 1 for value in state.values() if isinstance(value, Kept)), 0)
    drafts = any(isinstance(value, Drafted) or (isinstance(value, Kept) and value.paths) for value in state.values())
    if drafts and path_BK is None:
        raise ValueError("select: the call had a draft tree, so path_BK must say which of its branches is committed")
    if not torch.compiler.is_compiling() and n_B.device.type == "cpu":
        k = k if path_BK is None else min(k, path_BK.shape[1])
        if ((n_B < 0) | (n_B > k)).any():
            raise ValueError(f"select: n_B={n_B.tolist()}, each must be from 0 to the {k} columns that were kept")
    after, made = {}, {}
    for name, value in state.items():
        if isinstance(value, Kept):
            row_B = rows_B if value.paths is None else _line(value.paths, rows_B, n_B, path_BK)
            value = value.moments[row_B, n_B]
        elif isinstance(value, Drafted):
            value = _written(value, n_B, path_BK, made)
        after[name] = value
    return after


def _line(lines: Paths, rows_B: Tensor, n_B: Tensor, path_BK: Tensor) -> Tensor:
    """Number in (B L) of a line that begins with the first `n_B` columns of the path."""
    count, last_B1 = lines.columns_BLK.shape[1], (n_B - 1).clamp(min=0)[:, None]
    at_BL = lines.columns_BLK.gather(2, last_B1[..., None].expand(-1, count, 1))[..., 0]
    return rows_B * count + (at_BL == path_BK.gather(1, last_B1)).long().argmax(1)


def _written(drafted: Drafted, n_B: Tensor, path_BK: Tensor, made: dict) -> Tensor | Pages:
    """The growing tensor with the entries of the path. made: what is the same for all tensors of a call."""
    value, lines = drafted.value, drafted.paths
    key = tuple(map(id, (drafted.slot_BT, drafted.write_BT, lines)))
    if key not in made:
        if lines is None:
            index = torch.arange(len(n_B), device=n_B.device)[:, None], path_BK.clamp(min=0)
            write_BK = torch.arange(path_BK.shape[1], device=n_B.device) < n_B[:, None]
            made[key] = index, drafted.slot_BT[index], drafted.write_BT[index] & write_BK
        else:  # all of a line that is long enough
            index = _line(lines, torch.arange(len(n_B), device=n_B.device), n_B, path_BK)
            made[key] = index, drafted.slot_BT[index], drafted.write_BT[index]
    index, slot_BK, write_BK = made[key]
    entries = drafted.entries[index]
    if not isinstance(value, Pages):
        return _replaced(value, _source(value.shape[1], slot_BK, write_BK), entries)
    place = (*key, id(value.table_BN), value.pool.shape[1])
    if place not in made:
        made[place] = _page(value, slot_BK, write_BK)
    value.pool[made[place]] = entries.to(value.pool.dtype)
    return value


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
