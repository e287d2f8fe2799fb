"""rms_norm and layer_norm: each form against the definition, and torch."""

import pytest
import torch

from kernels import layer_norm, rms_norm
from tests.kernels.physics import DEVICE, chain, close
from tests.kernels.suite import Differentiable, wrong


def case(norm, shape, *names):
    def draw():
        inputs = {"x": torch.randn(shape) * 3}
        for name in names:
            inputs[name] = torch.randn(shape if name == "residual" else shape[-1:])
        return norm, inputs

    return draw


class TestNorm(Differentiable):
    CASES = {
        "rms": case(rms_norm, (2, 63, 60), "weight"),
        "rms-residual": case(rms_norm, (63, 60), "weight", "residual"),
        "rms-bare": case(rms_norm, (5, 129)),
        "layer": case(layer_norm, (2, 63, 60), "weight", "bias"),
        "layer-residual": case(layer_norm, (63, 60), "weight", "residual"),
        "layer-bare": case(layer_norm, (1, 60)),
        "layer-weight": case(layer_norm, (3, 60), "weight", "residual"),
        "layer-bias": case(layer_norm, (3, 60), "bias"),
        "vector": case(rms_norm, (60,), "weight"),
        "empty": case(layer_norm, (0, 60), "weight", "bias"),
    }
    SMALL = {
        "rms": case(rms_norm, (3, 5), "weight", "residual"),
        "layer": case(layer_norm, (3, 5), "weight", "bias"),
    }


def test_bfloat16_input_float_weight(form):
    chain(rms_norm, {"x": torch.randn(5, 60).bfloat16(), "weight": torch.randn(60)}, form)


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e6])
def test_extreme_sizes(size, form):
    chain(rms_norm, {"x": torch.randn(5, 60) * size, "weight": torch.randn(60)}, form)


def test_is_torch():
    x, weight, bias = (torch.randn(*shape, 60, device=DEVICE) for shape in ((3,), (), ()))
    functional = torch.nn.functional
    close(rms_norm(x, weight, eps=1e-5), functional.rms_norm(x, (60,), weight, 1e-5))
    close(layer_norm(x, weight, bias), functional.layer_norm(x, (60,), weight, bias))
    y, stream = layer_norm(x, residual=x.flip(0))
    close(stream, x + x.flip(0))
    close(y, functional.layer_norm(stream, (60,)))


def test_mistakes_name_the_argument():
    inputs = {"x": torch.randn(2, 4)}
    wrong(rms_norm, inputs, ValueError, "weight", weight=torch.randn(3))
    wrong(layer_norm, inputs, TypeError, "bias", bias=torch.arange(4))
    wrong(rms_norm, inputs, TypeError, "x must be floating", x=torch.arange(4))
    wrong(rms_norm, inputs, ValueError, "eps", eps=-1.0)
    wrong(rms_norm, inputs, ValueError, "residual", residual=torch.randn(2, 3))
    wrong(rms_norm, inputs, TypeError, "residual", residual=torch.randn(2, 4).half())
    wrong(rms_norm, inputs, ValueError, "weight must be on", weight=torch.randn(4, device="meta"))
