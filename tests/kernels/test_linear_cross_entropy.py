"""linear_cross_entropy: each form against the definition and torch, and how little it holds."""

import sys
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_cross_entropy
from tests.kernels.physics import DEVICE, chain, close, using
from tests.kernels.suite import Differentiable, wrong

chunked = sys.modules["kernels.linear_cross_entropy.chunked"]
blocks = sys.modules["kernels.linear_cross_entropy.blocks"]


def draw(tokens=63, dim=60, classes=97):
    targets = torch.randint(0, classes, (tokens,))
    targets[::5] = -100
    return {"x_ND": torch.randn(tokens, dim), "weight_CD": torch.randn(classes, dim) * 0.3, "targets_N": targets}


def case(*sizes, **options):
    return lambda: (partial(linear_cross_entropy, **options), draw(*sizes))


class TestLinearCrossEntropy(Differentiable):
    CASES = {
        "plain": case(),
        "softcap": case(17, softcap=5.0),
        "z-loss": case(17, z_loss=0.1),
        "smoothing": case(17, label_smoothing=0.1),
        "all": case(softcap=5.0, z_loss=0.1, label_smoothing=0.1),
        "two-tokens": case(2),
        "one-token-ignored": case(1),
        "no-tokens": case(0),
        "one-class": case(3, 4, 1),
    }
    SMALL = {"plain": case(4, 3, 5), "all": case(4, 3, 5, softcap=3.0, z_loss=0.1, label_smoothing=0.1)}


@pytest.fixture(params=[1, 16])
def tokens_of_a_block(request, form, monkeypatch):
    """Blocks of so few tokens in either form."""
    monkeypatch.setattr(chunked, "BLOCK", 97 * request.param)
    monkeypatch.setattr(blocks, "walk", partial_size(blocks.walk, request.param))
    return request.param


def partial_size(walk, size):
    return lambda args, rows, _, *rest: walk(args, rows, size, *rest)


def test_blocks_are_one_pass(tokens_of_a_block, form):
    chain(linear_cross_entropy, draw(17), form)


@pytest.mark.parametrize("reduce", ["sum", "mean", "mean of the real", "weighted"])
def test_gradients_made_ahead_are_those_of_any_reduction(reduce, form):
    """The gradient made in forward is scaled where one number serves, and made again where none does."""
    inputs, weights = draw(17), torch.rand(17)

    def call(weights_N, **x):
        losses_N = linear_cross_entropy(**x)
        if reduce == "weighted":
            return (losses_N * weights_N).sum()
        if reduce == "mean of the real":
            return losses_N[x["targets_N"] >= 0].mean()
        return losses_N.sum() if reduce == "sum" else losses_N.mean()

    chain(call, {**inputs, "weights_N": weights}, form)


def test_one_gradient_for_all_takes_no_more_products(form, monkeypatch):
    x = {n: v.to(DEVICE) for n, v in draw().items()}
    x["x_ND"].requires_grad_()
    x["weight_CD"].requires_grad_()
    with using(form):
        losses_N = linear_cross_entropy(**x)
        monkeypatch.setattr(blocks, "walk", None)
        losses_N.mean().backward(retain_graph=True)
        with pytest.raises(TypeError, match="NoneType"):
            losses_N.square().sum().backward()


@pytest.mark.parametrize("wanted", ["x_ND", "weight_CD"])
def test_only_the_gradient_that_is_needed(wanted, form):
    x = {n: v.to(DEVICE) for n, v in draw().items()}
    x[wanted].requires_grad_()
    found = []
    for name in (form, "reference"):
        with using(name):
            found.append(torch.autograd.grad(linear_cross_entropy(**x).sum(), x[wanted])[0])
    close(*found)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_is_torch_cross_entropy(smoothing, form):
    x = {n: v.to(DEVICE) for n, v in draw().items()}
    logits = x["x_ND"] @ x["weight_CD"].T
    with using(form):
        ours = linear_cross_entropy(**x, label_smoothing=smoothing)
        close(ours, cross_entropy(logits, x["targets_N"], reduction="none", label_smoothing=smoothing))
        capped = linear_cross_entropy(**x, softcap=5.0, z_loss=0.1)
    logits = 5 * (logits / 5).tanh()
    z = 0.1 * logits.logsumexp(1).square() * (x["targets_N"] >= 0)
    close(capped, cross_entropy(logits, x["targets_N"], reduction="none") + z)


def test_large_logits_are_safe(form):
    x = draw()
    chain(linear_cross_entropy, {**x, "x_ND": x["x_ND"] * 1e3}, form)


def test_no_target_at_all(form):
    x = draw()
    x["targets_N"].fill_(-100)
    found = chain(linear_cross_entropy, x, form)
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


@pytest.mark.parametrize("ahead", [False, True])
def test_never_holds_all_logits(monkeypatch, ahead):
    monkeypatch.setattr(chunked, "BLOCK", 8 * 97)
    x = draw(640, dim=4)
    call = (x["x_ND"], x["weight_CD"], x["targets_N"], 0.0, 0.0, 0.0, ahead, ahead)
    with Largest() as forward:
        _, *saved = chunked.chunked(*call)
    with Largest() as backward:
        chunked.grad(call, saved, [torch.rand(640)], [True, True] + 6 * [False])
    assert 0 < forward.elements <= 640 * 4 and 0 < backward.elements <= 640 * 4  # the logits are 640 * 97


def test_mistakes_name_the_argument():
    x = draw(4)
    for target in (97, -1):
        wrong(linear_cross_entropy, x, ValueError, "targets must be 0..96", targets_N=torch.tensor([0, 1, target, 3]))
    wrong(linear_cross_entropy, x, ValueError, "weight_CD", weight_CD=x["weight_CD"][:, :5])
    wrong(linear_cross_entropy, x, TypeError, "targets_N", targets_N=x["targets_N"].int())
    wrong(linear_cross_entropy, x, ValueError, "softcap", softcap=-1.0)
    wrong(linear_cross_entropy, x, ValueError, "z_loss", z_loss=-1.0)
    wrong(linear_cross_entropy, x, ValueError, "label_smoothing", label_smoothing=1.0)
    wrong(linear_cross_entropy, x, ValueError, "weight_CD must be on", weight_CD=torch.randn(97, 60, device="meta"))
