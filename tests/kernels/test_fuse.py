"""Passes that a tape joins: fewer ops with the bits of all of them, and none where somebody looks in between."""

import pytest
import torch
from torch import Tensor

import kernels
from kernels.cpu.tape import Tape
from kernels.packed_linear import BITS, pack, packed_linear

SIZES = (2, 40), (1, 1)


def held(size: int, dim: int, weights: str = "bf16", seed: int = 0):
    return pack(torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)), weights)


def played(function, example, rows: int = 37) -> tuple[Tape, list[Tensor], list[Tensor]]:
    """The tape, what the function returns and leaves in its inputs, and what the tape does."""
    tape = Tape(function, example, *SIZES)
    inputs = [torch.randn(x.shape).to(x.dtype) if x.is_floating_point() else x for x in example(rows, 1)]
    copies = [x.clone() for x in inputs]
    with torch.inference_mode():
        want, found = function(*inputs), tape(rows, 1, *copies)
    return tape, [*want, *inputs], [*found, *copies]


def same(want: list[Tensor], found: list[Tensor]) -> bool:
    return len(want) == len(found) and all(torch.equal(a, b) for a, b in zip(want, found))


def numbers(*widths: int, dtype=torch.bfloat16):
    """(B, 2, width) of each."""
    return lambda b, n: tuple(torch.empty(b, 2, width, dtype=dtype) for width in widths)


@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_what_a_product_ends_with_is_one_op(weights, biased):
    dtype = torch.float32 if weights in ("fp32", "int4") else torch.bfloat16
    onto, gates = held(50, 70, weights), held(96, 70, weights)
    bias = {size: torch.randn(size) if biased else None for size in (50, 96)}

    def add(x, stream):
        return (packed_linear(x, onto, bias[50]) + stream,)

    def gate(x):
        return (kernels.swiglu(*packed_linear(x, gates, bias[96]).chunk(2, -1)),)

    for function, example in ((add, numbers(70, 50, dtype=dtype)), (gate, numbers(70, dtype=dtype))):
        tape, want, found = played(function, example)
        assert same(want, found) and tape.ops == 1


W, GATES, UNEVEN = held(64, 64), held(128, 64), held(80, 64)
APART = {  # and the ops that are left
    "what is read twice": (lambda x: ((y := packed_linear(x, W)) + x, y * 2), 3),
    "what is returned": (lambda x: ((y := packed_linear(x, W)) + x, y), 2),
    "what is added to all rows": (lambda x: (packed_linear(x, W) + x[:, :1],), 3),
    "a part of a sum": (lambda x: (torch.add(x, packed_linear(x, W), alpha=2),), 2),
    "gates that somebody reads": (
        lambda x: (kernels.swiglu(*(both := packed_linear(x, GATES).chunk(2, -1))), both[0] * 2),
        4,
    ),
    "gates the other way round": (lambda x: (kernels.swiglu(*packed_linear(x, GATES).chunk(2, -1)[::-1]),), 3),
    "gates of tokens": (lambda x: (kernels.swiglu(*packed_linear(x, GATES).chunk(2, 1)),), 3),
    "gates of half a panel": (lambda x: (kernels.swiglu(*packed_linear(x, UNEVEN).chunk(2, -1)),), 3),
}


@pytest.mark.parametrize("what", APART)
def test_what_somebody_looks_at_stays_apart(what):
    function, ops = APART[what]
    tape, want, found = played(function, numbers(64))
    assert same(want, found) and tape.ops == ops


def test_a_product_is_not_put_off_beyond_a_write_to_its_input():
    def function(x, stream):
        y = packed_linear(x, W)
        x.mul_(3)
        return (y + stream,)

    tape, want, found = played(function, numbers(64, 64))
    assert same(want, found)


@pytest.mark.parametrize("accumulate", [False, True], ids=["put", "added up"])
@pytest.mark.parametrize("turned", [False, True], ids=["lines", "turned"])
def test_pages_are_written_as_by_an_index(accumulate, turned):
    """Entries are a part of a wider projection, and may lie in another order."""

    def function(pool, wide):
        page = torch.arange(len(wide))[:, None] + torch.arange(2)
        entries = wide[..., :6].unflatten(-1, (2, 3))
        if turned:
            entries = entries.transpose(-1, -2).contiguous().transpose(-1, -2)
        pool.index_put_((page, page % 4), entries, accumulate=accumulate)
        return (pool.sum(0),)

    _, want, found = played(function, lambda b, n: (torch.empty(48, 4, 2, 3), torch.empty(b, 2, 15)))
    assert same(want, found)


@pytest.mark.parametrize("beyond", ["page", "offset"])
def test_a_page_that_is_not_there_is_an_error(beyond):
    pool, entries = torch.zeros(3, 4, 2), torch.ones(2, 1, 2)
    page, offset = torch.tensor([[1], [2]]), torch.tensor([[0], [3]])
    torch.ops.edifice_cpu.write_pages(pool, page, offset, entries)
    assert pool.sum() == 4 and pool[1, 0].sum() == pool[2, 3].sum() == 2
    (page if beyond == "page" else offset)[1] = 4
    with pytest.raises(IndexError, match="no place"):
        torch.ops.edifice_cpu.write_pages(pool, page, offset, entries)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 15, 16, 100, 4097])
def test_the_largest_is_the_first_of_equals_and_nan_before_all(dtype, count):
    x = torch.randn(33, count).to(dtype)
    x[0], x[1], x[2, count // 2] = 1.0, -torch.inf, torch.nan
    x[3, count // 3 :] = x[3].amax()
    assert torch.equal(torch.ops.edifice_cpu.argmax(x), x.argmax(-1))
    assert torch.equal(torch.ops.edifice_cpu.argmax(x[:, ::2]), x[:, ::2].argmax(-1))
