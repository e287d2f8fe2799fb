"""entmax: each form against the definition, the conditions that make a maximum, and its limits."""

from functools import partial

import pytest
import torch

from kernels import entmax
from tests.kernels.physics import DEVICE, chain, close, using
from tests.kernels.suite import Differentiable, wrong


def case(*shape, alpha=1.5, dim=-1, masked=False):
    def draw():
        x = torch.randn(shape) * 2
        if masked:
            x = torch.where(torch.rand(shape) < 0.3, -torch.inf, x)
            x[..., 0] = 1.0
        return partial(entmax, alpha=alpha, dim=dim), {"x": x}

    return draw


class TestEntmax(Differentiable):
    CASES = {
        "1.5": case(2, 63, 60),
        "sparsemax": case(2, 63, 60, alpha=2.0),
        "other": case(63, 60, alpha=1.25),
        "masked-1.5": case(63, 60, masked=True),
        "masked-sparsemax": case(63, 60, alpha=2.0, masked=True),
        "masked-other": case(63, 60, alpha=1.7, masked=True),
        "first-dimension": case(5, 7, dim=0),
        "vector": case(60),
        "one": case(3, 1),
        "no-rows": case(0, 60),
        "no-columns": case(3, 0),
    }
    SMALL = {"1.5": case(3, 5), "other": case(2, 4, alpha=1.3), "first-dimension": case(3, 2, dim=0, alpha=2.0)}


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0])
def test_is_the_maximum(alpha, form):
    """At a maximum the slope of p . x + H(p) is one number over the support, and no larger outside."""
    x = torch.randn(20, 50, device=DEVICE) * 2
    with using(form):
        p = entmax(x, alpha=alpha).double()
    close(p.sum(-1), torch.ones_like(p[:, 0]), 1e-3 if alpha > 2 else 1e-5)
    slope = x.double() - p.pow(alpha - 1) / (alpha - 1)
    inside = p > 0
    most = torch.where(inside, slope, -torch.inf).amax(-1, keepdim=True)
    least = torch.where(inside, slope, torch.inf).amin(-1, keepdim=True)
    close(most, least, 1e-4)
    assert (slope <= most + 1e-4).all()
    assert alpha < 1.5 or (p == 0).any()


def test_towards_alpha_1_is_softmax(form):
    x = torch.randn(5, 20, device=DEVICE)
    with using(form):
        close(entmax(x, alpha=1.001), x.softmax(-1), 3e-3)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_ties_share_and_a_clear_winner_takes_all(alpha, form):
    x = torch.tensor([[3.0, 3.0, -9.0, 3.0], [99.0, 0.0, 0.0, 0.0], [1e4, 1e4, -1e4, 1e4]], device=DEVICE)
    third = [1 / 3, 1 / 3, 0.0, 1 / 3]
    with using(form):
        close(entmax(x, alpha=alpha), torch.tensor([third, [1.0, 0.0, 0.0, 0.0], third], device=DEVICE))
        close(entmax(x + 5, alpha=alpha), entmax(x, alpha=alpha))


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_long_flat_rows(alpha, form):
    chain(partial(entmax, alpha=alpha), {"x": torch.rand(2, 3000) * 0.01}, form)


def test_mistakes_name_the_argument():
    wrong(entmax, {"x": torch.arange(3)}, TypeError, "x must be floating")
    wrong(entmax, {"x": torch.randn(3)}, ValueError, "alpha", alpha=1.0)
    wrong(entmax, {"x": torch.randn(3)}, IndexError, "imension", dim=2)
