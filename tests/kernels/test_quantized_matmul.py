"""quantized_matmul: each form against the definition, a weight widened by hand, and what quantize promises."""

import gc
import sys
from functools import partial

import pytest
import torch

from kernels import quantize, quantized_matmul
from tests.kernels.physics import DEVICE, as_dtype, close, using
from tests.kernels.suite import Forward, wrong

chunked = sys.modules["kernels.quantized_matmul.chunked"]


def case(tokens, dim, size, bits, group=0, symmetric=True):
    def draw():
        weight = torch.randn(size, dim) + (0 if symmetric else 1.5)
        packed, scales, zeros = quantize(weight, bits=bits, group=group, symmetric=symmetric)
        # Scales of three bits, so that they are the same numbers in any dtype.
        scales = torch.ldexp((torch.frexp(scales).mantissa * 8).round() / 8, torch.frexp(scales).exponent)
        inputs = {"x_ND": torch.randn(tokens, dim), "packed_FP": packed, "scales_FG": scales, "zeros_FG": zeros}
        return partial(quantized_matmul, bits=bits), inputs

    return draw


class TestQuantizedMatmul(Forward):
    CASES = {
        "int8": case(3, 60, 35, 8),
        "int8-groups": case(5, 96, 70, 8, 32),
        "int8-zeros": case(3, 60, 35, 8, symmetric=False),
        "int8-long": case(2, 1120, 33, 8),
        "int4": case(3, 60, 35, 4),
        "int4-groups": case(1, 128, 32, 4, 64),
        "int4-zeros": case(3, 128, 32, 4, 32, symmetric=False),
        "int4-long": case(2, 1024, 48, 4, 128),
        "many-tokens": case(70, 64, 130, 4, 32),
        "no-tokens": case(0, 64, 16, 8),
    }
    SMALL = {"int8": case(2, 4, 3, 8), "int4": case(2, 32, 16, 4, 32, symmetric=False)}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_product_with_nearly_the_weight(bits, symmetric, dtype, form):
    """Each number is off by half a step at most, and the product is that with the numbers."""
    weight = torch.randn(32, 128) + 0.5
    packed, scales, zeros = quantize(weight, bits=bits, group=32, symmetric=symmetric)
    one = torch.eye(128, dtype=dtype, device=DEVICE)
    move = [None if v is None else as_dtype(v, dtype).to(DEVICE) for v in (packed, scales, zeros)]
    with using(form):
        held = quantized_matmul(one, *move, bits=bits).T.float().cpu()
    step = scales.repeat_interleave(32, 1)
    assert ((held - weight).abs() <= 0.51 * step + (0 if dtype == torch.float32 else 0.02 * weight.abs().max())).all()
    assert (held - weight).abs().max() > 0.4 * step.min()


def test_numbers_come_back_as_they_were():
    """A weight of whole steps is held exactly, and packs the first of two numbers low."""
    numbers = torch.randint(-7, 8, (16, 32))
    numbers[:, 0] = 7
    packed, scales, zeros = quantize(numbers.float(), bits=4)
    assert zeros is None and packed.shape == (16, 16) and (scales == 1).all()
    assert torch.equal((packed & 15).int() - 8, numbers[:, ::2].int())
    assert torch.equal((packed >> 4).int() - 8, numbers[:, 1::2].int())
    x = torch.randint(-3, 4, (5, 32)).float()
    assert torch.equal(quantized_matmul(x, packed, scales, bits=4), x @ numbers.float().T)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_stays_zero_and_an_empty_group_is_safe(symmetric):
    weight = torch.rand(4, 64)
    weight[:, ::2], weight[0] = 0, 0
    packed, scales, zeros = quantize(weight, bits=8, group=32, symmetric=symmetric)
    y = quantized_matmul(torch.eye(64), packed, scales, zeros).T
    assert (y[weight == 0] == 0).all() and y.isfinite().all()


def test_a_changed_weight_is_laid_out_again():
    x = torch.randn(1, 64).bfloat16()
    packed, scales, _ = quantize(torch.randn(32, 64).bfloat16(), bits=4, group=32)
    with using("chunked"):
        before = quantized_matmul(x, packed, scales, bits=4)
        packed.copy_(packed.flip(0))
        scales.copy_(scales.flip(0))
        after = quantized_matmul(x, packed, scales, bits=4)
        close(after.flip(1).float(), before.float())
    kept = len(chunked._laid_out)
    del packed
    gc.collect()
    assert len(chunked._laid_out) == kept - 1


def test_mistakes_name_the_argument():
    _, x = case(3, 64, 16, 4, 32)()
    call = partial(quantized_matmul, bits=4)
    wrong(call, x, ValueError, "packed_FP", x_ND=torch.randn(3, 60))
    wrong(call, x, TypeError, "packed_FP", packed_FP=x["packed_FP"].to(torch.int8))
    wrong(call, x, ValueError, "scales_FG", scales_FG=torch.ones(15, 2))
    wrong(call, x, ValueError, "scales_FG", scales_FG=torch.ones(16, 3))
    wrong(call, x, ValueError, "group=16", scales_FG=torch.ones(16, 4))
    wrong(call, x, ValueError, "zeros_FG", zeros_FG=torch.ones(16, 1))
    wrong(quantized_matmul, x, ValueError, "bits", bits=3)
    wrong(quantize, {"weight_FD": torch.randn(3, 64)}, ValueError, "group", group=48)
    wrong(quantize, {"weight_FD": torch.randn(3, 63)}, ValueError, "even", bits=4)
