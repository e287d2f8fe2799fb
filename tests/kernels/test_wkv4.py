"""wkv4: each form against the definition, the sum it stands for, and states carried."""

import torch

from kernels import wkv4
from tests.kernels.physics import close, placed, using
from tests.kernels.recurrent import Carried, Recurrent, packed
from tests.kernels.suite import Differentiable, wrong


def draw(tokens, rows=2, size=6, state=True):
    inputs = {
        "k_BTD": torch.randn(rows, tokens, size) * 2,
        "v_BTD": torch.randn(rows, tokens, size),
        "decay_D": -torch.rand(size) * 2,
        "bonus_D": torch.randn(size),
        "state_B3D": None,
    }
    if state:
        inputs["state_B3D"] = torch.stack(
            [torch.randn(rows, size), torch.rand(rows, size) + 1, torch.randn(rows, size)], 1
        )
    return inputs


def bound(keep=0):
    def call(k_BTD, v_BTD, decay_D, bonus_D, state_B3D=None, segments=None):
        return wkv4(k_BTD, v_BTD, decay_D, bonus_D, state_B3D=state_B3D, segments_BT=segments, keep=keep)

    return call


def case(tokens, rows=2, size=6, keep=0, state=True, pack=False):
    def make():
        inputs = draw(tokens, rows, size, state)
        if pack:
            inputs["segments"] = packed(rows, tokens)
        return bound(keep), inputs

    return make


class TestWKV4(Differentiable):
    CASES = {
        "plain": case(63, size=60, state=False),
        "state": case(63, size=20, keep=3),
        "packed": case(63, rows=3, size=20, pack=True, keep=2),
        "packed-fresh": case(40, rows=3, size=20, pack=True, state=False),
        "kept": case(5, keep=5),
        "empty": case(0),
        "one": case(1, keep=1),
        "one-fresh": case(1, state=False),
    }
    SMALL = {"state": case(6, size=3, keep=1), "packed": case(9, size=3, pack=True)}


recurrent = Recurrent(
    lambda segments=None, keep=0: lambda **x: bound(keep)(**x, segments=segments),
    lambda tokens, rows=2: draw(tokens, rows),
    ["state_B3D"],
    ["decay_D", "bonus_D"],
)


class TestCarried(Carried):
    RECURRENTS = {"wkv4": recurrent}


def test_is_the_weighted_average():
    """All weights of all pairs of tokens at once, in float64."""
    x = {n: v.double() for n, v in draw(17, state=False).items() if v is not None}
    k, v, w, u = x.values()
    ago = torch.arange(17)[:, None] - torch.arange(17)
    weights = ((ago - 1)[..., None] * w + k[:, None]).exp() * (ago > 0)[..., None]
    weights = weights + (u + k).exp()[:, None] * (ago == 0)[..., None]
    close(wkv4(k, v, w, u)[0], (weights * v[:, None]).sum(2) / weights.sum(2), 1e-12)


def test_large_keys_do_not_overflow(form):
    x = placed(draw(20, state=False))
    x["k_BTD"] *= 100
    with using(form):
        y, state = bound()(**x)
    assert y.isfinite().all() and state.isfinite().all()
    assert (y.abs() <= x["v_BTD"].abs().amax(1, keepdim=True) + 1e-5).all()


def test_mistakes_name_the_argument():
    inputs = draw(4)
    wrong(wkv4, inputs, ValueError, "v_BTD", v_BTD=torch.randn(2, 4, 5))
    wrong(wkv4, inputs, ValueError, "decay_D", decay_D=torch.randn(5))
    wrong(wkv4, inputs, TypeError, "bonus_D", bonus_D=torch.arange(6))
    wrong(wkv4, inputs, ValueError, "state_B3D", state_B3D=torch.randn(2, 2, 6))
    wrong(wkv4, inputs, ValueError, "keep=9", keep=9)
    wrong(wkv4, inputs, ValueError, "k_BTD", k_BTD=torch.randn(4, 6))
    wrong(wkv4, inputs, ValueError, "v_BTD must be on", v_BTD=torch.randn(2, 4, 6, device="meta"))
