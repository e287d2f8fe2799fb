"""nearest_code and residual_codes: each form against the definition, ties, and what rounding must not change."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import nearest_code, residual_codes
from tests.kernels.physics import DEVICE, chain, close, using
from tests.kernels.suite import Forward, wrong

chunked = sys.modules["kernels.nearest_code.chunked"]


def nearest(*shape):
    return lambda: (nearest_code, {"x_ND": torch.randn(shape[0], shape[2]), "codes_CD": torch.randn(*shape[1:])})


def residual(rows, books, count, dim):
    def draw():
        return residual_codes, {"x_ND": torch.randn(rows, dim), "codes_QCD": torch.randn(books, count, dim)}

    return draw


class TestNearestCode(Forward):
    CASES = {
        "odd": nearest(63, 97, 60),
        "many-codes": nearest(5, 300, 7),
        "long": nearest(9, 20, 300),
        "one-code": nearest(3, 1, 4),
        "one-number": nearest(40, 9, 1),
        "no-rows": nearest(0, 5, 4),
        "no-numbers": nearest(2, 3, 0),
        "residual": residual(33, 3, 40, 12),
        "residual-none": residual(3, 0, 4, 5),
    }
    SMALL = {"nearest": nearest(3, 4, 2), "residual": residual(3, 2, 4, 2)}


def test_is_the_argmin_of_all_distances(form):
    x, codes = torch.randn(50, 16, device=DEVICE), torch.randn(90, 16, device=DEVICE)
    with using(form):
        assert torch.equal(nearest_code(x, codes), torch.cdist(x.double(), codes.double()).argmin(1))


def test_equals_go_to_the_lower_index(form):
    codes = torch.randn(200, 24, device=DEVICE)
    codes[3] = codes[2] = codes[1]
    codes[130:] = codes[:70]
    x = codes + 0.01 * torch.randn_like(codes)
    with using(form):
        index = nearest_code(x, codes)
        assert index.tolist() == [{2: 1, 3: 1}.get(i % 130, i % 130) for i in range(200)]
        assert (nearest_code(torch.zeros(3, 2, device=DEVICE), torch.ones(70, 2, device=DEVICE)) == 0).all()


@pytest.mark.parametrize("offset", [100.0, 3e4])
def test_far_from_the_origin_products_cannot_tell(offset, form):
    """|c|^2 - 2 x c loses the differences here; the choice is right all the same."""
    codes = torch.randn(70, 8) + offset
    inputs = {"x_ND": codes.flip(0) + 0.1 * torch.randn(70, 8), "codes_CD": codes}
    chain(nearest_code, inputs, form, differentiable=False)
    x, c = inputs["x_ND"].to(DEVICE), codes.to(DEVICE)
    assert not torch.equal((c.square().sum(1) - 2 * x @ c.T).argmin(1), nearest_code(x, c)) or offset < 1e3


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(made):
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return made


def test_never_holds_all_distances(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 8 * 97)
    monkeypatch.setattr(chunked, "PAIRS", 1000)
    x, codes = torch.randn(640, 4), torch.randn(97, 4)
    want = nearest_code(x, codes)
    with Largest() as largest:
        assert torch.equal(chunked.chunked(x, codes), want)
    assert largest.elements <= 640 * 4


def test_residuals_get_smaller_and_add_up(form):
    x = torch.randn(40, 8, device=DEVICE)
    codes = torch.randn(3, 60, 8, device=DEVICE) * torch.tensor([1.0, 0.5, 0.25], device=DEVICE)[:, None, None]
    with using(form):
        indices, total = residual_codes(x, codes)
        close(total, sum(codes[q][indices[:, q]] for q in range(3)))
        assert torch.equal(indices[:, 0], nearest_code(x, codes[0]))
        assert torch.equal(indices[:, 1], nearest_code(x - codes[0][indices[:, 0]], codes[1]))
    left = [(x - sum(codes[q][indices[:, q]] for q in range(n))).square().mean() for n in (1, 2, 3)]
    assert left[0] > left[1] > left[2]


def test_mistakes_name_the_argument():
    x = {"x_ND": torch.randn(3, 4), "codes_CD": torch.randn(5, 4)}
    wrong(nearest_code, x, ValueError, "codes_CD", codes_CD=torch.randn(5, 3))
    wrong(nearest_code, x, ValueError, "at least one code", codes_CD=torch.randn(0, 4))
    wrong(nearest_code, x, TypeError, "x_ND", x_ND=torch.ones(3, 4).long())
    wrong(nearest_code, x, ValueError, "codes_CD must be on", codes_CD=torch.randn(5, 4, device="meta"))
    wrong(residual_codes, {"x_ND": torch.randn(3, 4)}, ValueError, "codes_QCD", codes_QCD=torch.randn(5, 4))
