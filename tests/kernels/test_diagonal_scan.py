"""diagonal_scan: each form against the definition, and the recurrence written as one triangular matrix."""

import pytest
import torch

from kernels import diagonal_scan
from tests.kernels.physics import DEVICE, chain, close, using
from tests.kernels.recurrent import Carried, Recurrent, packed
from tests.kernels.suite import Differentiable, wrong


def inputs(tokens=63, rows=2, sizes=(60,), dtype=torch.float32, constant=False, state=True):
    decay = torch.rand(sizes if constant else (rows, tokens, *sizes))
    if dtype.is_complex:
        decay = torch.polar(decay, torch.randn(decay.shape))
    x = torch.randn(rows, tokens, *sizes, dtype=dtype)
    return {"decay": decay, "x": x, "state": torch.randn(rows, *sizes, dtype=dtype) if state else None}


def run(segments=None, keep=0):
    return lambda segments_BT=segments, **x: diagonal_scan(**x, segments_BT=segments_BT, keep=keep)


def case(tokens=63, segments=False, keep=0, **options):
    def draw():
        x = inputs(tokens, **options)
        if segments:
            x["segments_BT"] = packed(2, tokens) if tokens > 8 else torch.tensor([[0, -1, 0, 1], [-1, 1, 2, -1]])
        return run(keep=keep), x

    return draw


class TestDiagonalScan(Differentiable):
    CASES = {
        "real": case(keep=3),
        "two-tiles": case(130, sizes=(7, 3)),
        "constant": case(130, sizes=(5,), constant=True),
        "bare": case(state=False),
        "packed": case(100, segments=True, keep=5, sizes=(20,)),
        "packed-constant": case(70, segments=True, constant=True, sizes=(20,)),
        "complex": case(70, dtype=torch.complex64, sizes=(20,), keep=2),
        "complex-constant": case(70, dtype=torch.complex64, sizes=(20,), constant=True, segments=True),
        "none": case(0),
        "one": case(1, keep=1),
        "two": case(2, keep=2, sizes=()),
    }
    SMALL = {
        "real": case(4, segments=True, keep=4, sizes=(3,)),
        "constant": case(20, sizes=(2,), constant=True, state=False),
        "complex": case(4, segments=True, keep=1, sizes=(2,), dtype=torch.complex64),
    }


class TestCarried(Carried):
    RECURRENTS = {
        "diagonal_scan": Recurrent(run, lambda tokens, rows=2: inputs(tokens, rows, (20,)), states=["state"]),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_is_a_triangular_matrix(dtype):
    """M[t, i] is the product of the decays after i up to t."""
    x = inputs(150, sizes=(4,), dtype=dtype)
    decay = x["decay"].to(x["x"]) * 1.1
    tokens = torch.arange(150)
    between = tokens[:, None, None] >= tokens[None, None, :]
    between = between & (tokens[None, None, :] > tokens[None, :, None])  # (t, i, s): i < s <= t
    m = torch.where(between[None, ..., None], decay[:, None, None], 1).prod(3)
    m = m * (tokens[:, None] >= tokens[None, :])[None, ..., None]
    first = torch.cat([x["x"][:, :1] + decay[:, :1] * x["state"][:, None], x["x"][:, 1:]], 1)
    want = torch.einsum("btid,bid->btd", m, first)
    h, state = diagonal_scan(decay, x["x"], state=x["state"])
    torch.testing.assert_close(h, want)
    torch.testing.assert_close(state, want[:, -1])


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, 1e-30, -2.0])
def test_any_decay(decay, form):
    chain(lambda x: diagonal_scan(torch.full_like(x[0, 0], decay), x), {"x": torch.randn(1, 100, 4)}, form)
    x = torch.randn(1, 100, 4, device=DEVICE)
    with using(form):
        ours = diagonal_scan(torch.full_like(x, decay), x)[0]
    if decay == 0:
        assert torch.equal(ours, x)
    if decay == 1:
        close(ours, x.double().cumsum(1).float())


def test_bfloat16_input_float_decay(form):
    x = inputs(40)
    chain(run(), {**x, "x": x["x"].bfloat16()}, form)


def test_mistakes_name_the_argument():
    x = inputs(4)
    wrong(run(), x, ValueError, "decay", decay=torch.rand(2, 4, 1))
    wrong(run(), x, TypeError, "decay must be real", decay=x["decay"].to(torch.complex64))
    wrong(run(), x, TypeError, "x must be floating", x=torch.ones(2, 4, 60, dtype=torch.int64))
    wrong(run(), x, ValueError, "state", state=torch.zeros(2, 4))
    wrong(run(), x, ValueError, "decay must be on", decay=x["decay"].to("meta"))
    wrong(run(keep=5), x, ValueError, "keep=5")
    wrong(run(torch.zeros(2, 3, dtype=torch.int64)), x, ValueError, "segments_BT")
