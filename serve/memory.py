"""The memory behind a batch: slots and pages, of one budget, sized once from the model's `state_spec`.

A page holds the same number of tokens of every growing tensor, so one table and one free list serve all of them. A
slot holds all that does not grow: fixed-size tensors, and windows as rings. A row, one sequence in the engine, has a
slot, and a page for each `page` of its tokens. Pages are counted by reference, so that rows with the same beginning
share them; a `Checkpoint`, what a row had besides final pages at one moment, has a slot too, of the same budget.
Page 0, and ring 0, belong to nobody: padding is written there. Nothing here knows an architecture.

The fixed tensors that a call returned are kept as they are while the same rows are asked for again, step after step,
and go back into their slots only when the rows of a call change: steady decoding copies no state.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from math import ceil, lcm, prod

import torch
from torch import Tensor

from models.state import Pages, State, TensorSpec

_SPACING = 512  # tokens of pages for which a budget has one slot for a checkpoint


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Copies of what a row had at one moment and would overwrite: its slot, and the pages that were not final."""

    slot: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a row may begin that others have computed: after `length` tokens, whole pages.

    pages: final ones, shared. checkpoint: the rest, copied; None when all that a row remembers is in final pages.
    """

    length: int
    pages: Items[int]
    checkpoint: Checkpoint | None


@dataclass(frozen=True, slots=True)
class Offload:
    """A row's state out of the budget, in host memory; `length` tokens of it."""

    length: int
    slot: dict[str, Tensor]
    pages: dict[str, Tensor]


class StateMemory:
    """Slots and pages for at most `max_rows` rows of at most `max_len` tokens.

    memory_bytes: budget of everything; None: every row can reach `max_len`. With less, rows compete for pages, and
    there are fewer rows than `max_rows` when not even their fixed part fits. page: tokens of a page, at least.
    sharing: rows begin where others were; the budget is then used up, for what is kept of rows that have ended.
    Raises ValueError when the budget is too small for a single row.

    rows: that can be lent at once. page: tokens of a page. slots, pages: there are. late: pages at the end of a
    prefix that later tokens still change. checkpoints: whether a row needs one to begin where another was.
    reclaim: called with (slots, pages) that must become free, and cannot always.
    """

    def __init__(
        self,
        spec: dict[str, TensorSpec],
        max_rows: int,
        max_len: int,
        memory_bytes: int | None = None,
        page: int = 16,
        device: torch.device | None = None,
        sharing: bool = False,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_len", max_len), ("page", page)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.max_len, self.device = max_len, device
        fixed = {name: part for name, part in spec.items() if not part.every}
        rings = {name: part for name, part in spec.items() if _is_ring(part, max_len)}
        grown = {name: part for name, part in spec.items() if name not in fixed and name not in rings}
        self.page = lcm(page, *(part.every for part in grown.values()))
        self._longest_row = ceil(max_len / self.page) if grown else 0  # in pages
        late = max((max_len if part.late < 0 else part.late for part in grown.values()), default=0)
        self.late = min(ceil(late / self.page), self._longest_row)
        self.checkpoints = bool(fixed.keys() - {"length", "segment"} or rings or self.late)
        self.rows, self.slots, self.pages = self._sizes(fixed, rings, grown, max_rows, memory_bytes, sharing)
        self._fill = {name: part.fill for name, part in fixed.items()}
        self._slots = {name: part.empty(self.slots, max_len, device) for name, part in fixed.items()}
        self._rings = {name: part.empty(self.slots + 1, max_len, device) for name, part in rings.items()}
        self._pools = {
            name: torch.full(
                (self.pages + 1, self.page // part.every, *part.shape), part.fill, dtype=part.dtype, device=device
            )
            for name, part in grown.items()
        }
        self._table = torch.zeros(self.slots, max(1, self._longest_row), dtype=torch.int64)  # on the CPU, edited there
        self._free_slots = list(range(self.slots - 1, -1, -1))
        self._free_pages = list(range(self.pages, 0, -1))
        self._references = [0] * (self.pages + 1)
        self._owned: dict[int, list[int]] = {}  # row -> its pages, in order
        self._held: dict[tuple[int, ...], State] = {}
        self._group: dict[int, tuple[int, ...]] = {}  # row -> the rows it is held with
        self.reclaim: Callable[[int, int], None] | None = None

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _sizes(
        self, fixed: dict, rings: dict, grown: dict, max_rows: int, memory_bytes: int | None, sharing: bool
    ) -> tuple[int, int, int]:
        """Rows, slots and pages."""
        ring = sum(part.bytes(self.max_len) for part in rings.values())
        held = sum(part.bytes(self.max_len) for part in fixed.values())  # the copy in use
        slot = held + ring
        page = sum(prod(part.shape) * part.dtype.itemsize * (self.page // part.every) for part in grown.values())
        keeping = sharing and self.checkpoints
        if memory_bytes is None:
            return max_rows, max_rows * (1 + keeping), max_rows * self._longest_row
        rest = memory_bytes - ring - page  # which belong to nobody
        least = slot + held + page
        if rest < least:
            raise ValueError(
                f"memory_bytes={memory_bytes}: a single row of this model needs {least + memory_bytes - rest} bytes"
            )
        rows = min(max_rows, rest // least) if least else max_rows
        rest -= rows * (slot + held)
        kept = int(rest / (slot + page * _SPACING / self.page)) if keeping else 0
        pages = (rest - kept * slot) // page if page else 0
        return rows, rows + kept, pages if sharing else min(pages, rows * self._longest_row)

    @property
    def widest(self) -> int:
        """Pages of the longest row."""
        return max(1, self._longest_row)

    @property
    def bytes(self) -> int:
        """Bytes held by the pools."""
        pools = (*self._slots.values(), *self._rings.values(), *self._pools.values())
        return sum(pool.numel() * pool.itemsize for pool in pools)

    @property
    def free_rows(self) -> int:
        return self.rows - len(self._owned)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def used_pages(self) -> int:
        """Pages of rows, each counted once; not those that are kept of rows that have ended."""
        return len(set().union(*list(self._owned.values())))

    @property
    def longest(self) -> int:
        """Tokens of the longest row that could ever be held, alone."""
        return min(self.max_len, self.pages * self.page) if self._longest_row else self.max_len

    def _needed(self, tokens: int) -> int:
        return min(-(-tokens // self.page), self._longest_row)

    def _available(self, slots: int, pages: int) -> bool:
        """Whether so many are free, once what is kept for later has made room."""
        short_slots, short_pages = slots - len(self._free_slots), pages - len(self._free_pages)
        if (short_slots > 0 or short_pages > 0) and self.reclaim is not None:
            self.reclaim(max(0, short_slots), max(0, short_pages))
        return len(self._free_slots) >= slots and len(self._free_pages) >= pages

    # -- rows ----------------------------------------------------------------------------------------------------

    def allocate(self, tokens: int, spare: bool = False, start: Start | None = None) -> int | None:
        """A row with room for `tokens` tokens, or None now. It is fresh, or begins at `start`.

        spare: a page for each row that may still need one stays free besides.
        """
        shared = start.pages if start else ()
        wanted = self._needed(tokens) - len(shared)
        growing = sum(len(owned) < self._longest_row for owned in self._owned.values()) if spare else 0
        if len(self._owned) == self.rows or not self._available(1, wanted + growing):
            return None
        row = self._free_slots.pop()
        self._flush({row})
        for name, pool in self._slots.items():
            pool[row] = self._fill[name]
        self._owned[row] = []
        for page in shared:
            self.refer(page)
        self._extend(row, shared)
        self.grow(row, tokens)
        if start:
            self._begin(row, start)
        return row

    def _begin(self, row: int, start: Start) -> None:
        if start.checkpoint is not None:
            for pool in self._slots.values():
                pool[row] = pool[start.checkpoint.slot]
            for pool in self._rings.values():
                pool[row + 1] = pool[start.checkpoint.slot + 1]
            first = len(start.pages)
            self._copy(start.checkpoint.pages, self._owned[row][first : first + len(start.checkpoint.pages)])
        self._slots["length"][row] = start.length

    def grow(self, row: int, tokens: int) -> bool:
        """Room for `tokens` tokens in `row`; False, and nothing changed, when pages are short."""
        short = self._needed(tokens) - len(self._owned[row])
        if short > 0:
            if not self._available(0, short):
                return False
            self._extend(row, [self._lend() for _ in range(short)])
        return True

    def _extend(self, row: int, pages: Items[int]) -> None:
        owned = self._owned[row]
        for page in pages:
            self._table[row, len(owned)] = page
            owned.append(page)

    def free(self, row: int) -> None:
        """Give a row and its pages back."""
        self._table[row] = 0
        for page in reversed(self._owned.pop(row)):
            self.forget(page)
        self._free_slots.append(row)

    def pages_of(self, row: int) -> Items[int]:
        """Pages of a row, in order."""
        return self._owned[row]

    def adopt(self, row: int, index: int, page: int) -> None:
        """`page` says the same as the one that `row` has at `index`, and takes its place."""
        owned = self._owned[row]
        if owned[index] != page:
            self.refer(page)
            self.forget(owned[index])
            owned[index] = self._table[row, index] = page

    # -- pages and checkpoints -----------------------------------------------------------------------------------

    def _lend(self) -> int:
        page = self._free_pages.pop()
        self._references[page] = 1
        return page

    def refer(self, page: int) -> None:
        """One more holds `page`."""
        self._references[page] += 1

    def forget(self, page: int) -> None:
        """One less holds `page`; the last one frees it."""
        self._references[page] -= 1
        if not self._references[page]:
            self._free_pages.append(page)

    def _copy(self, sources: Items[int], targets: Items[int]) -> None:
        if sources:
            source_N, target_N = torch.tensor([sources, targets], device=self.device)
            for pool in self._pools.values():
                pool[target_N] = pool[source_N]

    def checkpoint(self, row: int, tokens: int) -> Checkpoint | None:
        """A copy of what `row`, all of whose `tokens` tokens are computed, has besides final pages; None: no room."""
        last = tokens // self.page if self._longest_row else 0
        open_pages = self._owned[row][max(0, last - self.late) : last]
        if not self._available(1, len(open_pages)):
            return None
        slot, pages = self._free_slots.pop(), [self._lend() for _ in open_pages]
        for name, value in self._fixed(row).items():
            self._slots[name][slot] = value
        for pool in self._rings.values():
            pool[slot + 1] = pool[row + 1]
        self._copy(open_pages, pages)
        return Checkpoint(slot, tuple(pages))

    def drop(self, checkpoint: Checkpoint) -> None:
        """Give a checkpoint's slot and pages back."""
        self._free_slots.append(checkpoint.slot)
        for page in checkpoint.pages:
            self.forget(page)

    def offload(self, row: int, tokens: int) -> Offload:
        """A copy in host memory of the state of `row` after `tokens` tokens."""
        page_N = torch.tensor(self._owned[row][: self._needed(tokens)], dtype=torch.int64, device=self.device)
        slot = {name: value.to("cpu", copy=True) for name, value in self._fixed(row).items()}
        slot |= {name: pool[row + 1].to("cpu", copy=True) for name, pool in self._rings.items()}
        return Offload(tokens, slot, {name: pool[page_N].cpu() for name, pool in self._pools.items()})

    def restore(self, row: int, saved: Offload) -> None:
        """Into a fresh row with room for it."""
        page_N = torch.tensor(self._owned[row][: self._needed(saved.length)], dtype=torch.int64, device=self.device)
        for name, value in saved.slot.items():
            (self._rings[name][row + 1] if name in self._rings else self._slots[name][row]).copy_(value)
        for name, values in saved.pages.items():
            self._pools[name][page_N] = values.to(self.device)

    # -- state of a call -----------------------------------------------------------------------------------------

    def take(self, rows: tuple[int, ...], tokens: int | None = None) -> State:
        """The state of distinct `rows`, in that order, for one call of the model.

        tokens: the most that one of them has after the call, which sees no more pages than those need; None: all.
        """
        index_N = torch.tensor(rows)
        at_N = index_N.to(self.device)
        if rows in self._held:
            state = dict(self._held[rows])
        else:
            self._flush(set(rows))
            state = {name: pool[at_N] for name, pool in self._slots.items()}
        if self._pools:
            owned = max(len(self._owned.get(row, ())) for row in rows)
            seen = owned if tokens is None else min(owned, self._needed(tokens))
            width = max(2, seen)  # one more where it is one: a ring has one
            table_BN = self._table[index_N, :width].to(self.device)
            state |= {name: Pages(pool, table_BN) for name, pool in self._pools.items()}
        return state | {name: Pages(pool, at_N[:, None] + 1) for name, pool in self._rings.items()}

    def put(self, rows: tuple[int, ...], state: State) -> None:
        """Keep the state that `rows` have after a call. Pages were written in place."""
        if rows not in self._held:
            self._flush(set(rows))
        self._held[rows] = {name: state[name] for name in self._slots}
        self._group.update(dict.fromkeys(rows, rows))

    def _fixed(self, row: int) -> dict[str, Tensor]:
        """Fixed tensors of one row, wherever they are now."""
        group = self._group.get(row)
        if group is None:
            return {name: pool[row] for name, pool in self._slots.items()}
        index = group.index(row)
        return {name: value[index] for name, value in self._held[group].items()}

    def _flush(self, rows: set[int]) -> None:
        """Back into their slots: what is held of groups with one of `rows`."""
        for group in {self._group[row] for row in rows if row in self._group}:
            state = self._held.pop(group)
            live = [index for index, row in enumerate(group) if row in self._owned]
            for row in group:
                del self._group[row]
            if live:
                index_N = torch.tensor(live, device=self.device)
                row_N = torch.tensor([group[index] for index in live], device=self.device)
                for name, pool in self._slots.items():
                    pool[row_N] = state[name][index_N]


def _is_ring(part: TensorSpec, max_len: int) -> bool:
    """Whether a growing tensor is ever overwritten; one whose window is longer than any row only grows."""
    return part.every > 0 and part.window > 0 and part.capacity(max_len) < ceil(max_len / part.every)
