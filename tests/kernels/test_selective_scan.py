"""selective_scan: each form and algorithm against the definition, and the quadratic form of the same map."""

import pytest
import torch
from torch.nn.functional import softplus

from kernels import selective_scan
from kernels.selective_scan import chunked
from tests.kernels.physics import chain, close
from tests.kernels.recurrent import Carried, Recurrent, packed
from tests.kernels.suite import Differentiable, wrong

SCANS = ["chunked", "cumsum", "hillis_steele"]


def inputs(tokens=63, rows=2, size=60, states=5, state=True, skip=True):
    return {
        "x_BTD": torch.randn(rows, tokens, size),
        "step_BTD": softplus(torch.randn(rows, tokens, size)),
        "a_DN": -torch.rand(size, states) * 2,
        "b_BTN": torch.randn(rows, tokens, states),
        "c_BTN": torch.randn(rows, tokens, states),
        "d_D": torch.randn(size) if skip else None,
        "state_BDN": torch.randn(rows, size, states) if state else None,
    }


def run(segments=None, keep=0, scan="chunked"):
    return lambda segments_BT=segments, **x: selective_scan(**x, segments_BT=segments_BT, keep=keep, scan=scan)


def case(tokens=63, segments=False, keep=0, scan="chunked", **options):
    def draw():
        x = inputs(tokens, **options)
        if segments:
            x["segments_BT"] = packed(2, tokens) if tokens > 8 else torch.tensor([[0, -1, 0, 1], [1, -1, 2, 2]])
        return run(keep=keep, scan=scan), x

    return draw


class TestSelectiveScan(Differentiable):
    CASES = {
        "plain": case(keep=3),
        "tiles": case(100, size=7, states=16),
        "bare": case(state=False, skip=False, size=9, states=1),
        "packed": case(100, segments=True, keep=40, size=9),
        "cumsum": case(70, segments=True, size=9, scan="cumsum", keep=1),
        "hillis-steele": case(70, segments=True, size=9, scan="hillis_steele"),
        "none": case(0, size=3),
        "one": case(1, keep=1, size=3),
    }
    SMALL = {
        "plain": case(4, segments=True, keep=4, size=2, states=2),
        "cumsum": case(4, segments=True, keep=1, size=2, states=2, skip=False, scan="cumsum"),
        "hillis-steele": case(5, size=1, states=2, state=False, scan="hillis_steele"),
    }


class TestCarried(Carried):
    RECURRENTS = {
        "selective_scan": Recurrent(
            run, lambda tokens, rows=2: inputs(tokens, rows, 20), states=["state_BDN"], fixed=["a_DN", "d_D"]
        ),
    }


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("states", [2**19, 1])
def test_blocks_of_time(scan, states, monkeypatch):
    """Whatever number of blocks there is, and documents, kept states and gradients across their edges."""
    monkeypatch.setitem(chunked.__globals__, "STATES", states)
    call, x = case(150, segments=True, keep=70, size=3, scan=scan)()
    chain(call, x)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("step", [1e-6, 1.0, 1e3])
def test_any_step(scan, step):
    x = inputs(100, size=4)
    chain(run(scan=scan), {**x, "step_BTD": x["step_BTD"] * step, "x_BTD": x["x_BTD"] / step})


def test_is_a_weighted_sum_of_all_earlier_inputs():
    x = inputs(80, size=6)
    total = torch.einsum("btd,dn->btdn", x["step_BTD"].double().cumsum(1), x["a_DN"].double())
    between = (total[:, :, None] - total[:, None]).exp()  # (b, t, i, d, n)
    between = between * torch.ones(80, 80).tril()[None, ..., None, None]
    want = torch.einsum("btn,btidn,bid,bin->btd", x["c_BTN"].double(), between, (x["step_BTD"] * x["x_BTD"]).double(),
                        x["b_BTN"].double())  # fmt: skip
    want += torch.einsum("btn,btdn,bdn->btd", x["c_BTN"].double(), total.exp(), x["state_BDN"].double())
    close(run()(**x)[0], (want + x["d_D"] * x["x_BTD"]).float())


def test_mistakes_name_the_argument():
    x = inputs(4)
    wrong(run(), x, ValueError, "step_BTD", step_BTD=torch.zeros(2, 4, 3))
    wrong(run(), x, ValueError, "b_BTN", b_BTN=torch.zeros(2, 4, 3))
    wrong(run(), x, TypeError, "c_BTN", c_BTN=None)
    wrong(run(), x, TypeError, "a_DN must be floating", a_DN=torch.zeros(60, 5, dtype=torch.int64))
    wrong(run(), x, ValueError, "state_BDN must be on", state_BDN=torch.zeros(2, 60, 5, device="meta"))
    wrong(run(keep=5), x, ValueError, "keep=5")
    wrong(run(scan="fast"), x, ValueError, "scan='fast'")
