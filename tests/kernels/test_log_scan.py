"""log_scan: each form against the definition, and the linear recurrence on the values themselves."""

import pytest
import torch

from kernels import diagonal_scan, log_scan
from tests.kernels.physics import DEVICE, close, using
from tests.kernels.recurrent import Carried, Recurrent, packed
from tests.kernels.suite import Differentiable, wrong


def inputs(tokens=63, rows=2, size=60, state=True):
    return {
        "log_a_BTD": -torch.rand(rows, tokens, size),
        "log_b_BTD": torch.randn(rows, tokens, size),
        "log_state_BD": torch.randn(rows, size) if state else None,
    }


def signs(*shape):
    return torch.randint(0, 2, shape).mul(2).sub(1).to(torch.int8)


def run(segments=None, keep=0):
    """Logs alone, 0 for those of padding."""

    def call(segments_BT=segments, **x):
        y, sign, state, _ = log_scan(**x, segments_BT=segments_BT, keep=keep)
        return torch.where(sign == 0, 0, y), state

    return call


def values(keep=0):
    """Logs of near 0 are as inexact as they are large: signed numbers are compared as numbers."""

    def call(**x):
        y, sign, state, sign_state = log_scan(**x, keep=keep)
        return torch.where(sign == 0, 0, y).exp() * sign, torch.where(sign_state == 0, 0, state).exp() * sign_state

    return call


def case(tokens=63, segments=False, keep=0, signed=False, size=60, **options):
    def draw():
        x = inputs(tokens, size=size, **options)
        if signed:
            x |= {f"sign_{n}_BTD": signs(2, tokens, size) for n in "ab"}
            x["sign_state_BD"] = signs(2, size) if x["log_state_BD"] is not None else None
        if segments:
            x["segments_BT"] = packed(2, tokens) if tokens > 8 else torch.tensor([[0, -1, 0, 1], [1, -1, 2, 2]])
        return (values if signed else run)(keep=keep), x

    return draw


class TestLogScan(Differentiable):
    CASES = {
        "positive": case(keep=3),
        "two-tiles": case(130, size=20),
        "bare": case(70, state=False, size=20),
        "packed": case(100, segments=True, keep=5, size=20),
        "signed": case(70, signed=True, size=20, keep=1),
        "signed-packed": case(70, signed=True, size=20, segments=True, state=False),
        "none": case(0),
        "one": case(1, keep=1),
        "two": case(2, keep=2, signed=True),
    }
    SMALL = {
        "positive": case(4, segments=True, keep=1, size=3),
        "signed": case(4, segments=True, signed=True, keep=2, size=2),
        "longer": case(20, signed=True, state=False, size=1),
    }


class TestCarried(Carried):
    RECURRENTS = {
        "log_scan": Recurrent(run, lambda tokens, rows=2: inputs(tokens, rows, 20), states=["log_state_BD"]),
    }


@pytest.fixture(params=["reference", "chunked", "triton"])
def every(request):
    with using(request.param):
        yield


def gradients(y, x):
    return torch.autograd.grad(y.square().sum(), x, materialize_grads=True)


def test_is_the_linear_recurrence(every):
    x = case(70, signed=True, size=20)()[1]
    x = {n: v.to(DEVICE) for n, v in x.items()}
    leaves = [x[n].requires_grad_() for n in ("log_a_BTD", "log_b_BTD", "log_state_BD")]
    y, state = values()(**x)
    a, b = x["sign_a_BTD"] * x["log_a_BTD"].exp(), x["sign_b_BTD"] * x["log_b_BTD"].exp()
    with using("reference"):
        want, want_state = diagonal_scan(a, b, state=x["sign_state_BD"] * x["log_state_BD"].exp())
    close(y, want)
    close(state, want_state)
    for ours, theirs in zip(gradients(y, leaves), gradients(want, leaves), strict=True):
        close(ours, theirs)


def test_gradients_go_through_zero(every):
    """1 - 1 = 0: the log of that is -inf, and later values change with it all the same."""
    log_a = torch.zeros(1, 4, 1, device=DEVICE, requires_grad=True)
    log_b = torch.zeros(1, 4, 1, device=DEVICE, requires_grad=True)
    sign_b = torch.tensor([1, -1, 1, 1], dtype=torch.int8, device=DEVICE).view(1, 4, 1)
    y, sign, *_ = log_scan(log_a, log_b, sign_b_BTD=sign_b)
    assert y[0, 1] == -torch.inf
    assert sign.flatten().tolist() == [1, 0, 1, 1]
    da, db = torch.autograd.grad(y[0, 3].sum() + torch.where(sign == 0, 0, y)[0, 1].sum(), (log_a, log_b))
    close(db.flatten(), torch.tensor([0.5, -0.5, 0.5, 0.5], device=DEVICE))
    close(da.flatten(), torch.tensor([0, 0.5, 0.0, 0.5], device=DEVICE))
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_scan(log_a, log_b)[0].sum(), (log_a, log_b)))


def test_far_outside_the_range_of_floats(every):
    """h_t = e^(500 t): a sum of terms each e^500 times the last."""
    log_a = torch.full((1, 40, 2), 500.0, device=DEVICE)
    y, *_ = log_scan(log_a, torch.zeros_like(log_a))
    close(y[0, :, 0], 500.0 * torch.arange(40, device=DEVICE))
    y, *_ = log_scan(-log_a, -log_a)
    close(y, -log_a)


def test_a_decay_of_zero_forgets(every):
    log_a = torch.zeros(1, 6, 1, device=DEVICE, requires_grad=True)
    gone = torch.where(torch.arange(6, device=DEVICE)[None, :, None] == 3, -torch.inf, log_a)
    y, *_ = log_scan(gone, torch.zeros_like(log_a))
    close(y.exp().flatten(), torch.tensor([1.0, 2, 3, 1, 2, 3], device=DEVICE))
    assert torch.autograd.grad(y.sum(), log_a)[0].isfinite().all()


def test_nothing_but_zeros(every):
    log_a = torch.full((1, 70, 1), 3.0, device=DEVICE, requires_grad=True)
    y, sign, state, sign_state = log_scan(log_a, torch.full_like(log_a, -torch.inf))
    assert (y == -torch.inf).all()
    assert not sign.any()
    assert state == -torch.inf
    assert sign_state == 0
    close(torch.autograd.grad(torch.where(sign == 0, 0, y).sum(), log_a)[0], torch.zeros_like(log_a))


def test_mistakes_name_the_argument():
    x = inputs(4)
    wrong(run(), x, ValueError, "log_b_BTD", log_b_BTD=torch.zeros(2, 4, 3))
    wrong(run(), x, TypeError, "log_b_BTD", log_b_BTD=None)
    wrong(run(), x, TypeError, "sign_a_BTD must be torch.int8", sign_a_BTD=torch.ones(2, 4, 60))
    wrong(run(), x, ValueError, "sign_state_BD", log_state_BD=None, sign_state_BD=signs(2, 60))
    wrong(run(), x, ValueError, "log_state_BD must be on", log_state_BD=torch.zeros(2, 60, device="meta"))
    wrong(run(keep=5), x, ValueError, "keep=5")
