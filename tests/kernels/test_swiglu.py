"""swiglu: each form against the definition, and torch."""

import pytest
import torch

from kernels import swiglu
from tests.kernels.physics import DEVICE, chain, close
from tests.kernels.suite import Differentiable, wrong


def case(*shape):
    return lambda: (swiglu, {"gate": torch.randn(shape) * 3, "up": torch.randn(shape)})


class TestSwiglu(Differentiable):
    CASES = {"odd": case(2, 63, 60), "several blocks": case(3, 2047), "one": case(1), "empty": case(0, 60)}
    SMALL = {"small": case(3, 5)}


def test_is_torch():
    gate, up = torch.randn(2, 5, 60, device=DEVICE)
    close(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_large_gates_are_safe(size, form):
    gate = torch.full((5,), size)
    found = chain(swiglu, {"gate": gate, "up": torch.randn(5)}, form)
    if size < 0:
        assert all((x == 0).all() for x in found.values())


def test_strided_inputs(form):
    gate, up = torch.randn(7, 60).chunk(2, 1)
    chain(swiglu, {"gate": gate, "up": up}, form)


def test_mistakes_name_the_argument():
    inputs = {"gate": torch.randn(2, 4), "up": torch.randn(2, 4)}
    wrong(swiglu, inputs, ValueError, "up must be", up=torch.randn(4))
    wrong(swiglu, inputs, TypeError, "up must be", up=torch.randn(2, 4).half())
    wrong(swiglu, inputs, TypeError, "gate must be floating", gate=torch.arange(8).view(2, 4))
    wrong(swiglu, inputs, ValueError, "up must be on", up=torch.randn(2, 4, device="meta"))
