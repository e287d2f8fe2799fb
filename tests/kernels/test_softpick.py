"""softpick: each form against the definition, the formula as the paper has it, and what it is for."""

from functools import partial

import pytest
import torch

from kernels import softpick
from tests.kernels.physics import DEVICE, chain, close, using
from tests.kernels.suite import Differentiable, wrong


def case(*shape, dim=-1, masked=False):
    def draw():
        x = torch.randn(shape) * 1.5
        return partial(softpick, dim=dim), {"x": torch.where(torch.rand(shape) < 0.3, -torch.inf, x) if masked else x}

    return draw


class TestSoftpick(Differentiable):
    CASES = {
        "odd": case(2, 63, 60),
        "masked": case(63, 60, masked=True),
        "first-dimension": case(5, 7, dim=0),
        "vector": case(60),
        "one": case(3, 1),
        "no-rows": case(0, 60),
        "no-columns": case(3, 0),
    }
    SMALL = {"small": case(3, 5), "first-dimension": case(2, 3, dim=0)}


def test_is_the_papers_formula(form):
    x = torch.randn(7, 60, dtype=torch.float64, device=DEVICE).float()
    raised = torch.expm1(x.double())
    with using(form):
        close(softpick(x), (raised.relu() / (raised.abs().sum(-1, keepdim=True) + 1e-8)).float(), 1e-6)


def test_negative_entries_get_nothing_but_count(form):
    x = torch.tensor([[1.0, -1.0, 0.0], [1.0, -torch.inf, 0.0], [-1.0, -2.0, -3.0], [-9e9, -9e9, -9e9]])
    with using(form):
        y = softpick(x.to(DEVICE))
        shifted = softpick(x.to(DEVICE) + 1)
    assert (y[:, 1:] == 0).all() and (y[2:] == 0).all()
    assert 0 < y[0, 0] < 1 and abs(y[1, 0] - 1) < 1e-6  # masked is not there, negative takes a share
    assert not torch.allclose(y[0], shifted[0])


@pytest.mark.parametrize("size", [200.0, -200.0, 1e-4])
def test_extreme_sizes(size, form):
    chain(softpick, {"x": torch.rand(5, 60) * size}, form)


def test_a_row_of_masks_is_zero(form):
    found = chain(softpick, {"x": torch.full((2, 5), -torch.inf)}, form)
    assert all((v == 0).all() for v in found.values())


def test_mistakes_name_the_argument():
    wrong(softpick, {"x": torch.arange(3)}, TypeError, "x must be floating")
    wrong(softpick, {"x": torch.tensor(1.0)}, TypeError, "x must be a tensor")
    wrong(softpick, {"x": torch.randn(3)}, IndexError, "imension", dim=2)
