"""fp8_matmul: each form against the definition, and a product of operands widened by hand."""

import pytest
import torch

from kernels import fp8_matmul
from tests.kernels.physics import DEVICE, close, using
from tests.kernels.suite import Forward, recorded, wrong

E4M3 = torch.float8_e4m3fn


def call(a_MK, b_KN, scale_a, scale_b):
    """Operands are rounded here, and not by the suite, which asks for its own dtypes."""
    return fp8_matmul(a_MK.to(E4M3), b_KN.to(E4M3), scale_a, scale_b, dtype=a_MK.dtype)


def case(rows, dim, size, of_a=(), of_b=()):
    def draw():
        a, b = torch.randn(rows, dim).to(E4M3).float(), torch.randn(dim, size).to(E4M3).float()
        return call, {"a_MK": a, "b_KN": b, "scale_a": torch.rand(of_a) + 0.5, "scale_b": torch.rand(of_b) + 0.5}

    return draw


class TestFp8Matmul(Forward):
    CASES = {
        "whole": case(63, 60, 35),
        "rows": case(63, 60, 35, (63, 1), (1, 35)),
        "blocks": case(5, 300, 150, (5, 3), (3, 2)),
        "mixed": case(70, 130, 17, (), (2, 17)),
        "blocks-of-a": case(3, 260, 8, (1, 3), (1, 8)),
        "no-rows": case(0, 60, 35),
        "no-sum": case(3, 0, 5),
    }
    SMALL = {"whole": case(2, 3, 4), "rows": case(2, 3, 4, (2, 1), (1, 4))}

    def test_torch_checks_each_form(self, small, form, monkeypatch):
        """All but the check for written arguments, which needs arithmetic that 8-bit floats do not have."""
        for registered, args in recorded(*small(), form, monkeypatch):
            checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(registered._opoverload, args, test_utils=checks)


@pytest.mark.parametrize("transposed", [False, True])
def test_is_the_product_of_what_the_scales_give(transposed, form):
    a = torch.randn(9, 260, device=DEVICE).to(E4M3)
    b = torch.randn(140, 260, device=DEVICE).to(E4M3).T if transposed else torch.randn(260, 140, device=DEVICE).to(E4M3)
    scale_a, scale_b = torch.rand(9, 3, device=DEVICE), torch.rand(3, 2, device=DEVICE)
    of_a = torch.stack([scale_a[:, k // 128] for k in range(260)], 1)
    of_b = torch.stack([torch.stack([scale_b[k // 128, n // 128] for n in range(140)]) for k in range(260)])
    with using(form):
        y = fp8_matmul(a, b, scale_a, scale_b, dtype=torch.float32)
    close(y, (a.float() * of_a) @ (b.float() * of_b))


def test_the_result_has_the_type_asked_for(form):
    a = torch.eye(16, device=DEVICE).to(E4M3)
    one = torch.tensor(3.0, device=DEVICE)
    with using(form):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(fp8_matmul(a, a, one, one, dtype=dtype), 9 * torch.eye(16, dtype=dtype, device=DEVICE))


def test_mistakes_name_the_argument():
    a, b, one = torch.ones(3, 200).to(E4M3), torch.ones(200, 5).to(E4M3), torch.tensor(1.0)
    x = {"a_MK": a, "b_KN": b, "scale_a": one, "scale_b": one}
    wrong(fp8_matmul, x, ValueError, "b_KN", b_KN=b.T)
    wrong(fp8_matmul, x, TypeError, "a_MK", a_MK=a.float())
    wrong(fp8_matmul, x, ValueError, "scale_a", scale_a=torch.ones(3, 3))
    wrong(fp8_matmul, x, ValueError, "scale_b", scale_b=torch.ones(5))
    wrong(fp8_matmul, x, TypeError, "scale_b", scale_b=1.0)
    wrong(fp8_matmul, x, TypeError, "dtype", dtype=torch.int8)
    wrong(fp8_matmul, x, ValueError, "b_KN must be on", b_KN=b.to("meta"))
