"""packed_linear: the product with the weight that is held, whatever else is in the call."""

from functools import partial

import pytest
import torch

from kernels import cpu
from kernels.packed_linear import BITS, pack, packed_linear, plain, rows, unpack
from tests.kernels.suite import wrong

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "int4": torch.float32}
STEP = {"int8": 127, "int4": 7}


@pytest.fixture(params=[(5, 40, 35), (1, 640, 128), (33, 192, 16), (70, 100, 50)], ids=str)
def sizes(request):
    return request.param


def test_the_compiler_of_this_machine_builds_it():
    """Where these tests run the C++ is what is tested, not the plain form behind it."""
    assert cpu.available()


@pytest.mark.parametrize("weights", BITS)
def test_it_is_the_product_with_what_is_held(weights, sizes):
    tokens, dim, size = sizes
    packed, dtype = pack(torch.randn(size, dim), weights), DTYPES[weights]
    x, bias = torch.randn(tokens, dim).to(dtype), torch.randn(size)
    exact = x.double() @ unpack(packed, torch.float64).T + bias.double()
    error = (packed_linear(x, packed, bias).double() - exact).abs()
    if weights in STEP:  # x, too, is rounded: each number by half of a 127th of the largest of its group at most
        held = unpack(packed, torch.float64).abs()
        groups = torch.nn.functional.pad(x.double().abs(), (0, -dim % 64)).unflatten(1, (-1, 64))
        half = groups.amax(2).repeat_interleave(64, 1)[:, :dim] / 254
        allowed = half @ held.T + 2 * torch.finfo(dtype).eps * exact.abs() + 1e-4
        assert (error <= allowed).all()
        assert error.norm() <= 0.01 * exact.norm()
    else:
        assert (
            error <= 4 * torch.finfo(dtype).eps * (x.double().abs() @ unpack(packed, torch.float64).abs().T + 1)
        ).all()
    near = plain(x, packed, bias).double()
    assert (near - exact).norm() <= (0.01 if dtype == torch.bfloat16 else 1e-5) * exact.norm()


@pytest.mark.parametrize("weights", BITS)
def test_a_row_does_not_know_the_others(weights):
    """Bit for bit the same alone, in any batch, at any place in it."""
    packed = pack(torch.randn(70, 192), weights)
    x = torch.randn(64, 192).to(DTYPES[weights])
    whole = packed_linear(x, packed)
    for count in range(1, 65):
        assert torch.equal(packed_linear(x[:count], packed), whole[:count]), count
        assert torch.equal(packed_linear(x[64 - count :], packed), whole[64 - count :]), count


@pytest.mark.parametrize("weights", BITS)
def test_weights_are_rounded_to_the_nearest(weights):
    weight = torch.randn(40, 200)
    packed = pack(weight, weights)
    off = (unpack(packed, torch.float32) - weight).abs()
    if weights in STEP:
        groups = torch.nn.functional.pad(weight.abs(), (0, 56)).unflatten(1, (-1, 64)).amax(2)
        # The scale is a bf16 number, so what is largest may be off by a little more than half a step.
        assert (off <= groups.repeat_interleave(64, 1)[:, :200] / STEP[weights] * 0.51 + weight.abs() / 128).all()
        assert packed.weight.nbytes == 48 * 256 * packed.bits // 8
    else:
        assert torch.equal(unpack(packed, torch.float32), weight.to(DTYPES[weights]).float())
    ids = torch.tensor([[3, 39], [0, 3]])
    assert torch.equal(rows(packed, ids, torch.float32), unpack(packed, torch.float32)[ids])


def test_zeros_and_no_rows_are_safe():
    for weights in BITS:
        packed = pack(torch.zeros(17, 65), weights)
        x = torch.zeros(2, 65, dtype=DTYPES[weights])
        assert (packed_linear(x, packed) == 0).all()
        assert packed_linear(x[:0], packed).shape == (0, 17)
        assert packed_linear(x.expand(3, 2, 65), packed).shape == (3, 2, 17)


def test_mistakes_name_the_argument():
    packed = pack(torch.randn(16, 64), "bf16")
    x = {"x": torch.randn(2, 64).bfloat16(), "packed": packed, "bias_F": torch.zeros(16)}
    call = partial(packed_linear)
    wrong(call, x, TypeError, "x must be", x=torch.randn(2, 64))
    wrong(call, x, ValueError, "D=64", x=torch.randn(2, 63).bfloat16())
    wrong(call, x, ValueError, "bias_F", bias_F=torch.zeros(15))
    with pytest.raises(ValueError, match="int3.*choose fp32, bf16, int8, int4"):
        pack(torch.randn(16, 64), "int3")
