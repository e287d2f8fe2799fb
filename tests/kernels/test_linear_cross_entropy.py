"""linear_cross_entropy: chunked against its form and torch, and how little it holds."""

import sys

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_cross_entropy
from tests.kernels.physics import chain, close, using

chunked = sys.modules["kernels.linear_cross_entropy.chunked"]


def inputs(tokens=63, dim=60, classes=97, dtype=torch.float32):
    targets = torch.randint(0, classes, (tokens,))
    targets[::5] = -100
    return {
        "x_ND": torch.randn(tokens, dim, dtype=dtype),
        "weight_CD": torch.randn(classes, dim, dtype=dtype) * 0.3,
        "targets_N": targets,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 63])
@pytest.mark.parametrize("block", [97, 97 * 16, 1 << 22])
def test_chain(tokens, block, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", block)
    chain(linear_cross_entropy, inputs(tokens, dtype=dtype))


def test_is_torch_cross_entropy():
    x = inputs()
    close(
        linear_cross_entropy(**x),
        cross_entropy(x["x_ND"] @ x["weight_CD"].T, x["targets_N"], reduction="none"),
    )


def test_large_logits_are_safe():
    x = inputs()
    chain(linear_cross_entropy, {**x, "x_ND": x["x_ND"] * 1e3})


def test_no_target_at_all():
    x = inputs()
    x["targets_N"].fill_(-100)
    found = chain(linear_cross_entropy, x)
    assert all((v == 0).all() for v in found.values())


class Largest(TorchDispatchMode):
    """The most elements any tensor made inside had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def test_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 8 * 97)
    x = inputs(640, dim=4)
    call = (x["x_ND"], x["weight_CD"], x["targets_N"])
    with Largest() as forward:
        chunked.chunked(*call)
    with Largest() as backward:
        chunked.grad(call, (), [torch.ones(640)], [True, True, False])
    assert 0 < forward.elements <= 640 * 4 and 0 < backward.elements <= 640 * 4  # the logits are 640 * 97


def test_gradcheck():
    x = inputs(4, dim=3, classes=5)
    real = [x[n].double().requires_grad_() for n in ("x_ND", "weight_CD")]

    def call(a, b):
        return linear_cross_entropy(a, b, x["targets_N"])

    with using("reference"):
        assert torch.autograd.gradcheck(call, real)
    assert torch.autograd.gradcheck(call, real)
    assert torch.autograd.gradgradcheck(call, real)


def test_mistakes_name_the_argument():
    x = inputs(4)
    with pytest.raises(ValueError, match="targets must be 0..96"):
        linear_cross_entropy(x["x_ND"], x["weight_CD"], torch.tensor([0, 1, 97, 3]))
    with pytest.raises(ValueError, match="weight_CD"):
        linear_cross_entropy(x["x_ND"], x["weight_CD"][:, :5], x["targets_N"])
    with pytest.raises(TypeError, match="targets_N"):
        linear_cross_entropy(x["x_ND"], x["weight_CD"], x["targets_N"].int())
