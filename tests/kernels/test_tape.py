"""Tapes: what is recorded gives the same bits at other sizes, and what cannot be is refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import op
from kernels.cpu.tape import NotRecorded, Tape


@dataclass(frozen=True)
class Pair:
    first: Tensor
    second: dict[str, Tensor | None]
    count: int = 2


WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
POOL = torch.zeros(40, 4)


def sizes(b, n):
    """Inputs of b rows and n pages."""
    return torch.randn(b, 4), {"table": torch.randint(0, 40, (b, n)), "none": None}


def layer(x, state):
    """Views, factories, numbers of sizes, scalars, lists, several outputs, and equal work done twice."""
    rows, pages = state["table"].shape
    angle = (2.0 ** -torch.arange(4, dtype=torch.float32))[None].cos()
    again = (2.0 ** -torch.arange(4, dtype=torch.float32))[None].cos()
    mask = torch.arange(3 * pages + 1) % (2 * pages) > 1
    found = POOL[state["table"]].view(rows * pages, 4).unflatten(0, (rows, -1)).sum(1)
    first, second = torch.nn.functional.linear(x * angle + again / 3, WEIGHT).split([2, 4], -1)
    second = torch.cat([second, found, torch.zeros(rows, 1)], 1).clamp(min=-1)
    return Pair(first.sigmoid(), {"second": second, "mask": mask, "none": None})


def test_it_plays_at_any_sizes_between():
    tape = Tape(layer, sizes, (2, 32), (2, 16))
    assert tape.ops < 25  # angles are known, and asked for once
    for b, n in ((2, 2), (3, 7), (17, 2), (32, 16)):
        inputs = sizes(b, n)
        with torch.inference_mode():
            want, found = layer(*inputs), tape(b, n, *inputs)
        assert torch.equal(found.first, want.first) and found.count == 2 and found.second["none"] is None
        assert torch.equal(found.second["second"], want.second["second"])
        assert torch.equal(found.second["mask"], want.second["mask"])


def test_it_writes_where_the_function_writes():
    """In order: what is read after a write sees it, and the same read before is another one."""

    def write(x, pool, place):
        before = pool[place] * 2
        pool[place] = x
        pool.view(-1).mul_(3)
        return before, pool[place] * 2

    def example(b, n):
        return torch.empty(b, 4), torch.empty(40, 4), torch.empty(b, dtype=torch.int64)

    tape = Tape(write, example, (2, 8), (1, 1))
    ours, theirs = (torch.arange(160.0).view(40, 4) for _ in range(2))
    for step in range(3):
        x, place = torch.randn(5, 4), torch.randperm(40)[:5]
        with torch.inference_mode():
            want, found = write(x, theirs, place), tape(5, 1, x, ours, place)
        assert all(torch.equal(a, b) for a, b in zip(want, found)) and torch.equal(ours, theirs), step


def test_what_it_returned_stays_when_it_plays_again():
    tape = Tape(layer, sizes, (2, 32), (2, 16))
    with torch.inference_mode():
        first = tape(3, 4, *sizes(3, 4))
        kept = first.second["second"].clone()
        tape(3, 4, *sizes(3, 4))
    assert torch.equal(first.second["second"], kept)


REFUSED = {
    "a branch on numbers": lambda x, state: x * 2 if bool((x > 0).all()) else x,
    "a list of numbers": lambda x, state: x * sum(state["table"][0].tolist()),
    "as many as there are": lambda x, state: x[x[:, 0] > 0],
    "a branch on sizes": lambda x, state: x * 2 if len(x) > 16 else x,
    "a bend": lambda x, state: torch.zeros(max(len(x), 8)),
    "a float of sizes": lambda x, state: x * (1 / len(x)),
    "as many tensors as rows": lambda x, state: torch.stack(list(x.unbind())),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_depends_on_numbers_is_refused(what):
    with pytest.raises(NotRecorded) as caught:
        Tape(REFUSED[what], sizes, (2, 32), (2, 16))
    assert "\n" not in str(caught.value)


def test_a_dict_is_the_same_in_whatever_order_it_was_filled():
    """A state that a model returns has another order than the one that a memory gives."""

    def step(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"b": state["b"] + 1, "a": state["a"] * 2}

    tape = Tape(step, lambda b, n: ({"a": torch.empty(b, n), "b": torch.empty(b, n)},), (1, 3), (1, 4))
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    found = tape(2, 3, {"b": b, "a": a})
    assert torch.equal(found["a"], a * 2) and torch.equal(found["b"], b + 1)


def test_a_kernel_that_looks_at_numbers_is_one_op():
    """At sizes that were not recorded, with other numbers: what it looks at when it is played is what counts."""
    look = op.Op("looks", _first, _first, _empty, differentiable=False)

    def function(x, count):
        return (look(x * 2, count) + 1,)

    def example(b, n):
        return torch.randn(b, 4), torch.tensor(2)

    tape = Tape(function, example, (2, 8), (1, 1))
    assert tape.ops == 3
    for b, count in ((3, 0), (5, 1), (8, 4)):
        x, count = torch.randn(b, 4), torch.tensor(count)
        with torch.inference_mode():
            assert torch.equal(tape(b, 1, x, count)[0], function(x, count)[0])


def _first(x: Tensor, count: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, : int(count)] = x[:, : int(count)]
    return y


def _empty(x: Tensor, count: Tensor) -> Tensor:
    return torch.empty_like(x)
