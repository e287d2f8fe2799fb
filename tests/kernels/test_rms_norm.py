"""rms_norm: chunked against its definition and torch."""

import pytest
import torch

from kernels import rms_norm
from tests.kernels.physics import chain, close, definition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(60,), (0, 60), (1, 60), (2, 63, 60)], ids=str)
@pytest.mark.parametrize("weight", [True, False])
def test_chain(shape, weight, dtype):
    weight = torch.randn(60, dtype=dtype) if weight else None
    chain(rms_norm, {"x": torch.randn(shape, dtype=dtype) * 3, "weight": weight})


def test_chain_bf16_input_float_weight():
    chain(rms_norm, {"x": torch.randn(5, 60).bfloat16(), "weight": torch.randn(60)})


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e6])
def test_chain_extreme_sizes(size):
    chain(rms_norm, {"x": torch.randn(5, 60) * size, "weight": torch.randn(60)})


def test_is_torch_rms_norm():
    x, weight = torch.randn(3, 60), torch.randn(60)
    close(rms_norm(x, weight, eps=1e-5), torch.nn.functional.rms_norm(x, (60,), weight, 1e-5))
    close(rms_norm(x), torch.nn.functional.rms_norm(x, (60,), None, 1e-6))


def test_gradcheck():
    x, weight = torch.randn(3, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    with definition():
        assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradgradcheck(rms_norm, (x, weight))


def test_mistakes_name_the_argument():
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.randn(2, 4), torch.randn(3))
    with pytest.raises(TypeError, match="x must be floating"):
        rms_norm(torch.arange(4))
    with pytest.raises(ValueError, match="eps"):
        rms_norm(torch.randn(4), eps=-1.0)
