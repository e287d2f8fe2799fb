"""What registration gives every op: torch's own checks, compile without breaks, checkpointing, the environment."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import View, op
from tests.kernels.physics import close

SEGMENTS = torch.tensor([[0, 0, -1, 1, 1, 2], [1, 1, 1, 1, -1, -1]])


def attention(q, k, v, past_k, past_v):
    view = View({"k": k, "v": v}, {"k": past_k, "v": past_v}, torch.tensor([3, 4]), segments_BT=SEGMENTS)
    return kernels.attention(q, view, window=4)


CALLS = {
    "attention": (attention, [(2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8), (2, 5, 2, 8), (2, 5, 2, 8)]),
    "causal": (
        lambda q, k, v: kernels.attention(q, View({"k": k, "v": v}, {})),
        [(2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8)],
    ),
    "conv1d": (
        lambda x, w, s: kernels.conv1d(x, w, activation="silu", state_BWD=s, segments_BT=SEGMENTS, keep=2),
        [(2, 6, 5), (5, 3), (2, 2, 5)],
    ),
    "gated_delta": (
        lambda q, k, v, d, b, s: kernels.gated_delta(q, k, v, -d.abs(), b, state_BHKV=s, segments_BT=SEGMENTS),
        [(2, 6, 2, 4), (2, 6, 2, 4), (2, 6, 2, 3), (2, 6, 2), (2, 6, 2), (2, 2, 4, 3)],
    ),
    "rms_norm": (kernels.rms_norm, [(2, 6, 5), (5,)]),
    "linear_cross_entropy": (
        lambda x, w: kernels.linear_cross_entropy(x, w, torch.tensor([1, 2, -100])),
        [(3, 4), (5, 4)],
    ),
}
ATTENTION = [torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)]
POSITIONS = SEGMENTS * 0 + torch.arange(6)
STATE = torch.randn(2, 5, 2, 8)
OPS = {
    "attention": [
        (*ATTENTION, *[None] * 9, 0.3, 0, True, 0.0),
        (*ATTENTION, STATE, STATE.clone(), torch.tensor([3, 4]), POSITIONS, SEGMENTS, *[None] * 4, 0.3, 4, False, 0.0),
    ],
    "conv1d": [
        (torch.randn(2, 6, 5), torch.randn(5, 3), None, None, None, True, 0),
        (torch.randn(2, 6, 5), torch.randn(5, 3), torch.randn(5), torch.randn(2, 2, 5), SEGMENTS, False, 2),
    ],
    "gated_delta": [
        (
            *(torch.randn(2, 6, 2, 4) for _ in range(3)),
            -torch.rand(2, 6, 2),
            torch.rand(2, 6, 2),
            state,
            numbers,
            0.5,
            keep,
        )
        for state, numbers, keep in ((None, None, 0), (torch.randn(2, 2, 4, 4), SEGMENTS, 2))
    ],
    "linear_cross_entropy": [(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, 2, -100]))],
}


def flat(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def leaves(shapes):
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def total(outputs):
    return sum(y.square().sum() for y in flat(outputs))


@pytest.mark.parametrize("name, case", [(n, i) for n, cases in OPS.items() for i in range(len(cases))])
def test_opcheck(name, case):
    args = [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in OPS[name][case]
    ]
    torch.library.opcheck(getattr(torch.ops.edifice, name).default, args)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_break(name):
    call, shapes = CALLS[name]
    x = leaves(shapes)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, want in zip(flat(compiled(*x)), flat(call(*x)), strict=True):
        close(ours, want)
    for ours, want in zip(*(torch.autograd.grad(total(f(*x)), x) for f in (compiled, call)), strict=True):
        close(ours, want)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(name, reentrant):
    call, shapes = CALLS[name]
    x = leaves(shapes)
    held = checkpoint(call, *x, use_reentrant=reentrant)
    want = torch.autograd.grad(total(call(*x)), x)
    total(held).backward()
    for leaf, g in zip(x, want, strict=True):
        close(leaf.grad, g)


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_only_where_one_is_asked_for(name):
    call, shapes = CALLS[name]
    x = leaves(shapes)
    want = torch.autograd.grad(total(call(*x)), x)
    for i in range(len(x)):
        one = [v.detach() for v in x]
        one[i].requires_grad_()
        close(torch.autograd.grad(total(call(*one)), one[i])[0], want[i])


@pytest.mark.parametrize("name", CALLS)
def test_inputs_computed_from_each_other(name):
    """The gradient of a gradient counts each path once, also when one input is a function of another."""
    call, shapes = CALLS[name]
    seed = torch.randn(()).requires_grad_()
    fixed = leaves(shapes)
    outputs = call(*(x.detach() * (1 + seed) for x in fixed))
    once = torch.autograd.grad(total(outputs), seed)[0]
    again = torch.autograd.grad(total(call(*(x.detach() * (1 + seed) for x in fixed))), seed, create_graph=True)[0]
    close(again, once)


def test_environment_chooses_the_form():
    code = (
        "import torch, kernels; from kernels import op, norm;"
        "norm._op.reference = lambda *a: ('reference', None); norm._op.chunked = lambda *a: ('chunked', None);"
        "norm._op._triton = lambda *a: ('triton', None); print(kernels.rms_norm(torch.ones(2)))"
    )

    def run(value):
        env = {**os.environ, "EDIFICE_KERNELS": value}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    for value, want in (("reference", "reference"), ("chunked", "chunked"), ("triton", "triton"), ("", "chunked")):
        assert run(value).stdout.strip() == want
    assert "EDIFICE_KERNELS='fast'" in run("fast").stderr


def test_names():
    code = (
        "from kernels.attention.view import View as A; from kernels.attention import View as B; import kernels;"
        "assert A is B is kernels.View and callable(kernels.attention) and callable(kernels.conv1d)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert op.FORM in op.FORMS


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_changes_nothing_inside(grad):
    """The types of an op's products are those of its arguments, also where autocast would narrow them."""
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    with torch.set_grad_enabled(grad):
        want = kernels.linear_attention(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            found = kernels.linear_attention(q, k, v)
    for ours, plain in zip(found, want, strict=True):
        assert torch.equal(ours, plain)
