"""long_conv: each form against the definition, and the convolution as one Toeplitz matrix."""

import pytest
import torch

from kernels import long_conv
from tests.kernels.physics import DEVICE, chain, close, placed, using
from tests.kernels.suite import Differentiable, wrong


def inputs(tokens=63, rows=3, size=6, taps=None, skip=True):
    return {
        "x_BTD": torch.randn(rows, tokens, size),
        "filter_DL": torch.randn(size, tokens if taps is None else taps),
        "skip_D": torch.randn(size) if skip else None,
    }


def case(*args, **options):
    return lambda: (long_conv, inputs(*args, **options))


class TestLongConv(Differentiable):
    CASES = {
        "odd": case(),
        "wide": case(63, rows=1, size=17, skip=False),
        "power": case(128, rows=2, size=3),
        "longer": case(300, rows=1, size=2),
        "short-filter": case(130, taps=7),
        "filter-beyond": case(20, taps=33),
        "one": case(1),
        "none": case(0, taps=4),
        "no-rows": case(5, rows=0),
    }
    SMALL = {"skip": case(5, rows=3, size=2), "bare": case(4, rows=1, size=1, taps=6, skip=False)}


def test_is_a_toeplitz_matrix(form):
    x = placed(inputs(70))
    back = torch.arange(70)[:, None] - torch.arange(70)
    matrix = torch.where((back >= 0).to(DEVICE), x["filter_DL"].double()[:, back.clamp(0)], 0)  # (D, t, i)
    want = torch.einsum("dti,bid->btd", matrix, x["x_BTD"].double()) + x["skip_D"] * x["x_BTD"].double()
    with using(form):
        close(long_conv(**x), want.float())


def test_later_inputs_change_earlier_outputs_by_rounding_alone(form):
    """A large later input would show if the padded end wrapped into the start."""
    x = placed(inputs(128, skip=False))
    other = {**x, "x_BTD": torch.cat([x["x_BTD"][:, :50], x["x_BTD"][:, 50:] * -3], 1)}
    with using(form):
        y = long_conv(**x)
        changed = long_conv(**other)
    assert (changed - y)[:, :50].abs().max() < 16 * torch.finfo(y.dtype).eps * changed.abs().max()
    assert (changed - y)[:, 50:].abs().max() > 1


def test_an_impulse_is_answered_by_the_filter(form):
    x = placed(inputs(40, skip=False))
    impulse = torch.zeros_like(x["x_BTD"])
    impulse[:, 0] = 1
    with using(form):
        close(long_conv(impulse, x["filter_DL"])[1], x["filter_DL"].T)


@pytest.mark.slow
def test_longest_of_one_program():
    chain(long_conv, inputs(2048, rows=2, size=1), "triton")


def test_triton_refuses_what_does_not_fit():
    with using("triton"):
        wrong(long_conv, inputs(2049, rows=1, size=1), ValueError, "does not take")


def test_mistakes_name_the_argument():
    x = inputs(4)
    wrong(long_conv, x, ValueError, "filter_DL", filter_DL=torch.zeros(5, 4))
    wrong(long_conv, x, ValueError, "L of at least 1", filter_DL=torch.zeros(6, 0))
    wrong(long_conv, x, ValueError, "skip_D", skip_D=torch.zeros(5))
    wrong(long_conv, x, TypeError, "x_BTD must be floating", x_BTD=torch.zeros(3, 4, 6, dtype=torch.int64))
    wrong(long_conv, x, ValueError, "filter_DL must be on", filter_DL=torch.zeros(6, 4, device="meta"))
