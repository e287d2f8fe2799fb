"""Slots and pages: nobody's memory is somebody else's, nothing is lost, and the state of a row follows it around."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.state import Pages, TensorSpec
from serve.memory import Start, StateMemory

SPEC = {
    "length": TensorSpec((), torch.int64),
    "sum": TensorSpec((3,), torch.float32, fill=2.0),
    "k": TensorSpec((2,), torch.float32, every=1),
    "block": TensorSpec((2,), torch.float32, every=4, late=3),
    "ring": TensorSpec((2,), torch.float32, every=1, window=8),
}


def make(rows=3, max_len=100, **options) -> StateMemory:
    return StateMemory(SPEC, rows, max_len, page=4, **options)


def test_a_fresh_row_is_as_the_spec_fills_it_also_after_others_used_it():
    memory = make(rows=1)
    row = memory.allocate(5)
    state = memory.take((row,))
    assert state["length"].tolist() == [0] and state["sum"].tolist() == [[2.0] * 3]
    memory.put((row,), {**state, "sum": torch.full((1, 3), 7.0), "length": torch.tensor([5])})
    memory.free(row)
    assert memory.take((memory.allocate(5),))["sum"].tolist() == [[2.0] * 3]


def test_fixed_state_follows_its_row_through_other_groups():
    memory = make()
    rows = [memory.allocate(4) for _ in range(3)]
    for step, group in enumerate([(0, 1, 2), (0, 1, 2), (2, 0), (1,), (1, 2, 0), (0,)]):
        group = tuple(rows[index] for index in group)
        state = memory.take(group)
        memory.put(group, {**state, "sum": state["sum"] + torch.tensor(group)[:, None] * 10.0**step})
    expected = {0: 2 + 0.0, 1: 2 + 1 * (1 + 10 + 1000 + 10000), 2: 2 + 2 * (1 + 10 + 100 + 10000)}
    for row in rows:
        assert memory.take((row,))["sum"][0, 0].item() == expected[row]


def test_state_may_be_put_for_some_of_the_rows_that_were_taken():
    memory = make()
    both = tuple(memory.allocate(4) for _ in range(2))
    fixed = {name: value for name, value in memory.take(both).items() if isinstance(value, Tensor)}
    memory.put(both, {**fixed, "sum": torch.tensor([[5.0] * 3, [6.0] * 3])})
    memory.put(both[:1], {name: value[:1] for name, value in fixed.items()} | {"sum": torch.full((1, 3), 7.0)})
    assert memory.take(both)["sum"][:, 0].tolist() == [7.0, 6.0]


def test_pages_of_a_row_keep_their_order_when_it_grows():
    memory = make()
    a, b = memory.allocate(3), memory.allocate(3)
    before = memory.take((a,))["k"].table_BN[0].tolist()
    assert memory.grow(b, 20) and memory.grow(a, 20)
    state = memory.take((b, a))
    assert state["k"].table_BN.shape == (2, 5) and before == [*state["k"].table_BN[1].tolist()[:1], 0]
    assert state["block"].table_BN is state["k"].table_BN and state["block"].capacity == 5 == state["k"].capacity // 4
    assert state["ring"].table_BN.tolist() == [[b + 1], [a + 1]]
    assert state["ring"].capacity == SPEC["ring"].capacity(100)
    assert all(isinstance(state[name], Pages) for name in ("k", "block", "ring"))


def test_a_window_longer_than_any_row_is_no_ring():
    """It grows page by page, as if it had no window."""
    memory = make(max_len=8)
    row = memory.allocate(3)
    assert sum(page > 0 for page in memory.take((row,))["ring"].table_BN[0]) == 1
    assert memory.grow(row, 8) and sum(page > 0 for page in memory.take((row,))["ring"].table_BN[0]) == 2


def test_growing_is_all_or_nothing():
    memory = make(rows=2, memory_bytes=1800)
    row = memory.allocate(1)
    most = memory.longest
    assert most < 100
    free = memory.free_pages
    assert not memory.grow(row, most + 1) and memory.free_pages == free
    assert memory.grow(row, most)
    assert memory.allocate(1) is None
    memory.free(row)
    row, tokens = memory.allocate(1), 1
    while memory.free_pages > 1:
        tokens += 1
        assert memory.grow(row, tokens)
    assert memory.allocate(1, spare=True) is None and memory.allocate(1) is not None  # the first may grow further


@pytest.mark.parametrize("sharing", [False, True])
def test_the_budget_is_kept_and_used(sharing):
    fixed, ring, page = 8 + 12, 40 * 8, 4 * 8 + 8
    for budget in (2500, 5000, 20000, 10**6):
        memory = make(rows=8, memory_bytes=budget, sharing=sharing)
        used = memory.bytes + fixed * memory.rows  # the copy in use
        assert used <= budget and (used > budget - page - fixed - ring or memory.pages == 8 * 25)
        assert memory.rows == 8 or budget <= 5000
    plain = make(rows=8)
    assert plain.longest == 100 and plain.slots == 8 and plain.pages == 8 * 25
    # What rows cannot need is still of use to those that come after them.
    assert memory.slots > 8 and memory.pages > 8 * 25 if sharing else memory.bytes == plain.bytes
    with pytest.raises(ValueError, match=r"^memory_bytes=100: a single row of this model needs \d+ bytes$"):
        make(memory_bytes=100)
    make(rows=1, memory_bytes=2 * fixed + 2 * ring + 2 * page)
    with pytest.raises(ValueError):
        make(rows=1, memory_bytes=2 * fixed + 2 * ring + 2 * page - 1)


def filled(memory, row, value) -> None:
    """Every kind of state of `row` becomes `value`."""
    state = memory.take((row,))
    for part in state.values():
        if isinstance(part, Pages):
            part.pool[part.table_BN[0]] = value
    memory.put((row,), {name: torch.full_like(state[name], value) for name in ("length", "sum")})


def values(memory, row) -> dict[str, set[float]]:
    state = memory.take((row,))
    return {
        name: set((part.pool[part.table_BN[0]] if isinstance(part, Pages) else part).flatten().tolist())
        for name, part in state.items()
    }


def test_a_row_begins_where_another_was():
    """Final pages are shared; slot, ring and pages that are not final are copies, whatever becomes of the original."""
    memory = make(rows=2, sharing=True)
    first = memory.allocate(12)
    filled(memory, first, 5)
    pages = list(memory.pages_of(first))
    checkpoint = memory.checkpoint(first, 12)
    assert len(checkpoint.pages) == memory.late == 1
    filled(memory, first, 6)
    second = memory.allocate(16, start=Start(12, pages[:2], checkpoint))
    assert memory.pages_of(second)[:2] == pages[:2] and len(set(memory.pages_of(second)) & set(pages)) == 2
    table = memory.take((second,))["k"].table_BN[0]
    assert memory.take((second,))["k"].pool[table[2]].unique().tolist() == [5.0]
    assert values(memory, second)["ring"] == {5.0} and values(memory, second)["sum"] == {5.0}
    assert memory.take((second,))["length"].tolist() == [12]
    free = memory.free_pages
    memory.free(first)
    assert memory.free_pages == free + 1  # two are still the other's
    memory.drop(checkpoint)
    memory.free(second)
    assert memory.free_pages == memory.pages and memory.free_slots == memory.slots


def test_an_offloaded_row_comes_back_bit_for_bit():
    memory = make(rows=2)
    row, other = memory.allocate(7), memory.allocate(7)
    state = memory.take((other, row))
    memory.put((other, row), {**state, "sum": torch.arange(6.0).view(2, 3), "length": torch.tensor([7, 7])})
    for part in memory.take((row,)).values():
        if isinstance(part, Pages):
            part.pool[part.table_BN[0]] = torch.randn_like(part.pool[part.table_BN[0]])
    before = values(memory, row)
    saved = memory.offload(row, 7)
    memory.free(row)
    filled(memory, memory.allocate(9), 1)
    memory.free(other)
    row = memory.allocate(9)
    memory.restore(row, saved)
    after = values(memory, row)
    assert all(before[name] <= after[name] for name in before) and after["sum"] == {3.0, 4.0, 5.0}
    assert after["length"] == {7}


@pytest.mark.parametrize("name", ["rows", "max_len"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match="must be at least 1"):
        make(**{name: 0})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["allocate", "grow", "free"]), st.integers(0, 7), st.integers(1, 60)), max_size=40
    )
)
def test_no_page_has_two_owners_and_none_is_lost(actions):
    memory = make(rows=3, max_len=60, memory_bytes=4000)
    lengths: dict[int, int] = {}
    for action, which, tokens in actions:
        if action == "allocate":
            row = memory.allocate(tokens)
            if row is not None:
                assert row not in lengths
                lengths[row] = tokens
        elif lengths:
            row = sorted(lengths)[which % len(lengths)]
            if action == "free":
                memory.free(row)
                del lengths[row]
            elif memory.grow(row, tokens):
                lengths[row] = max(lengths[row], tokens)
        tables = {row: memory.take((row,))["k"].table_BN[0].tolist() for row in lengths}
        used = [page for table in tables.values() for page in table if page]
        assert len(used) == len(set(used)) == memory.used_pages
        for row, length in lengths.items():
            assert sum(page > 0 for page in tables[row]) * 4 >= length
        assert len(used) + memory.free_pages == memory.pages
        assert memory.free_rows == memory.rows - len(lengths)
