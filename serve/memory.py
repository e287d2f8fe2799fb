"""The memory behind a batch: pools sized once from the model's `state_spec`, from which rows and pages are lent.

A fixed-size tensor has one slot per row. A windowed tensor is a ring, one page per row that holds its whole capacity. A
growing tensor has small pages from a free list, shared by all tensors with the same `every`, and a row gets more as it
becomes longer. Page 0 belongs to nobody: padding is written there. Nothing here knows an architecture.

The fixed tensors that a call returned are kept as they are while the same rows are asked for again, step after step,
and go back into their slots only when the rows of a call change: steady decoding copies no state.
"""

from math import ceil, prod

import torch

from models.state import Pages, State, TensorSpec


class StateMemory:
    """Rows and pages for at most `max_rows` rows of at most `max_len` tokens.

    memory_bytes: budget of everything; None means that every row can reach `max_len`. With less, rows compete for
    pages, and there are fewer rows than `max_rows` when not even their fixed part fits.
    page: entries of a page. Raises ValueError when the budget is too small for a single row.
    """

    def __init__(
        self,
        spec: dict[str, TensorSpec],
        max_rows: int,
        max_len: int,
        memory_bytes: int | None = None,
        page: int = 16,
        device: torch.device | None = None,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_len", max_len), ("page", page)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.page, self.max_len, self.device = page, max_len, device
        fixed = {name: part for name, part in spec.items() if not part.every}
        rings = {name: part for name, part in spec.items() if _is_ring(part, max_len)}
        grown = {name: part for name, part in spec.items() if name not in fixed and name not in rings}
        self._every = {name: part.every for name, part in grown.items()}
        self.rows, self.pages = self._sizes(fixed, rings, grown, max_rows, memory_bytes)
        self._fill = {name: part.fill for name, part in fixed.items()}
        self._slots = {name: part.empty(self.rows, max_len, device) for name, part in fixed.items()}
        self._rings = {name: part.empty(self.rows + 1, max_len, device) for name, part in rings.items()}
        self._pools = {
            name: torch.full((self.pages[part.every], page, *part.shape), part.fill, dtype=part.dtype, device=device)
            for name, part in grown.items()
        }
        self._tables = {  # on the CPU, where they are edited
            every: torch.zeros(self.rows, self._needed(every, max_len), dtype=torch.int64) for every in self.pages
        }
        self._free_pages = {every: list(range(count - 1, 0, -1)) for every, count in self.pages.items()}
        self._owned: dict[int, dict[int, list[int]]] = {}  # row -> every -> pages, in order
        self._free_rows = list(range(self.rows - 1, -1, -1))
        self._held: dict[tuple[int, ...], State] = {}

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _sizes(
        self, fixed: dict, rings: dict, grown: dict, max_rows: int, memory_bytes: int | None
    ) -> tuple[int, dict[int, int]]:
        """Rows, and pages (with page 0) by `every`."""
        per_row = 2 * sum(part.bytes(self.max_len) for part in fixed.values())  # a slot, and the copy in use
        ring_bytes = sum(part.bytes(self.max_len) for part in rings.values())
        page_bytes: dict[int, int] = {}
        for part in grown.values():
            page_bytes[part.every] = page_bytes.get(part.every, 0) + prod(part.shape) * part.dtype.itemsize * self.page
        if memory_bytes is None:
            return max_rows, {every: 1 + max_rows * self._needed(every, self.max_len) for every in page_bytes}
        rest = memory_bytes - ring_bytes - sum(page_bytes.values())  # page 0 of each
        least = per_row + ring_bytes + sum(page_bytes.values())
        if rest < least:
            raise ValueError(
                f"memory_bytes={memory_bytes}: a single row of this model needs {least + memory_bytes - rest} bytes"
            )
        rows = max_rows if least == 0 else min(max_rows, rest // least)
        rest -= rows * (per_row + ring_bytes)
        per_token = sum(size / (self.page * every) for every, size in page_bytes.items())
        pages = {}
        for every in page_bytes:  # so that they run out together
            share = int(rest / per_token / (self.page * every))
            pages[every] = 1 + max(1, min(share, rows * self._needed(every, self.max_len)))
        return rows, pages

    def _needed(self, every: int, tokens: int) -> int:
        return ceil(ceil(tokens / every) / self.page)

    @property
    def bytes(self) -> int:
        """Bytes held by the pools."""
        pools = (*self._slots.values(), *self._rings.values(), *self._pools.values())
        return sum(pool.numel() * pool.itemsize for pool in pools)

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def free_pages(self) -> int:
        """Pages left, of the kind that runs out first; 0 when nothing grows."""
        return min((len(pages) for pages in self._free_pages.values()), default=0)

    @property
    def longest(self) -> int:
        """Tokens of the longest row that could ever be held, alone."""
        return min([self.max_len, *((count - 1) * self.page * every for every, count in self.pages.items())])

    def fits(self, tokens: int) -> bool:
        """Whether a row of `tokens` tokens could ever be held, alone."""
        return tokens <= self.longest

    # -- rows ----------------------------------------------------------------------------------------------------

    def allocate(self, tokens: int, spare: bool = False) -> int | None:
        """A fresh row with room for `tokens` tokens, or None now. spare: a page for each row that may still need one of
        a kind stays free besides."""
        enough = all(
            len(free) >= self._needed(every, tokens) + (self._growing(every) if spare else 0)
            for every, free in self._free_pages.items()
        )
        if not self._free_rows or not enough:
            return None
        row = self._free_rows.pop()
        self._flush({row})
        for name, pool in self._slots.items():
            pool[row] = self._fill[name]
        self._owned[row] = {every: [] for every in self.pages}
        self.grow(row, tokens)
        return row

    def _growing(self, every: int) -> int:
        """Rows that have not all pages of a kind that the longest row needs."""
        most = self._needed(every, self.max_len)
        return sum(len(owned[every]) < most for owned in self._owned.values())

    def grow(self, row: int, tokens: int) -> bool:
        """Room for `tokens` tokens in `row`; False, and nothing changed, when pages are short."""
        short = {}
        for every, owned in self._owned[row].items():
            short[every] = self._needed(every, tokens) - len(owned)
            if short[every] > len(self._free_pages[every]):
                return False
        for every, count in short.items():
            owned, free = self._owned[row][every], self._free_pages[every]
            for _ in range(count):
                self._tables[every][row, len(owned)] = free[-1]
                owned.append(free.pop())
        return True

    def free(self, row: int) -> None:
        """Give a row and its pages back."""
        for every, owned in self._owned.pop(row).items():
            self._tables[every][row] = 0
            self._free_pages[every].extend(reversed(owned))
        self._free_rows.append(row)

    # -- state of a call -----------------------------------------------------------------------------------------

    def take(self, rows: tuple[int, ...]) -> State:
        """The state of distinct `rows`, in that order, for one call of the model."""
        index_N = torch.tensor(rows)
        state = self._held.get(rows)
        if state is None:
            self._flush(set(rows))
            at_N = index_N.to(self.device)
            state = {name: pool[at_N] for name, pool in self._slots.items()}
        else:
            state = dict(state)
        tables = {}
        for every, table in self._tables.items():
            width = max(1, max(len(self._owned[row][every]) for row in rows))
            tables[every] = table[index_N, :width].to(self.device)
        for name, pool in self._pools.items():
            state[name] = Pages(pool, tables[self._every[name]])
        if self._rings:
            table_N1 = (index_N[:, None] + 1).to(self.device)
            for name, pool in self._rings.items():
                state[name] = Pages(pool, table_N1)
        return state

    def put(self, rows: tuple[int, ...], state: State) -> None:
        """Keep what a call on `take(rows)` returned. Pages were written in place."""
        self._held[rows] = {name: state[name] for name in self._slots}

    def _flush(self, rows: set[int]) -> None:
        """Back into their slots: what is held of groups with one of `rows`."""
        for group in [group for group in self._held if not rows.isdisjoint(group)]:
            state = self._held.pop(group)
            index_N = torch.tensor(group, device=self.device)
            for name, pool in self._slots.items():
                pool.index_copy_(0, index_N, state[name])


def _is_ring(part: TensorSpec, max_len: int) -> bool:
    """Whether a growing tensor is ever overwritten; one whose window is longer than any row only grows."""
    return part.every > 0 and part.window > 0 and part.capacity(max_len) < ceil(max_len / part.every)
