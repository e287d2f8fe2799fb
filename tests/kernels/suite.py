"""What holds of every op: a test class per op derives from `Differentiable` or `Forward` and lists its cases.

A case is a function without arguments that draws `(call, inputs)`: `call(**inputs)` is the public function with its
options bound, `inputs` are tensors in float32, or None. Every tensor goes through `inputs`, so that it can be moved
to a GPU. CASES are of odd sizes, for the chain of forms; SMALL ones are for checks that run an op many times.
"""

from functools import partial

import pytest
import torch

from kernels import op
from tests.kernels.physics import as_dtype, chain, close, moves, placed, results, using, widened


class Forward:
    """An op without gradients, whose forms agree: inference, or selection, where integers come out equal."""

    CASES: dict
    SMALL: dict
    DTYPES = (torch.float32, torch.bfloat16)
    differentiable = False

    def test_each_form_is_as_exact_as_its_definition(self, case, form):
        call, inputs = case()
        for dtype in self.DTYPES:
            chain(call, {n: as_dtype(x, dtype) for n, x in inputs.items()}, form, self.differentiable)

    def test_torch_checks_each_form(self, small, form, monkeypatch):
        for registered, args in recorded(*small(), form, monkeypatch):
            if self.differentiable:
                args = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) and moves(x) else x for x in args]
            torch.library.opcheck(registered._opoverload, args)

    def test_compiles_without_a_break(self, small, form):
        call, inputs = small()
        inputs = placed(inputs)
        torch.compiler.reset()
        with using(form):
            want = results(call, inputs, self.differentiable)
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            for name, ours in results(compiled, inputs, self.differentiable).items():
                close(ours, want[name])


class Differentiable(Forward):
    """An op with gradients."""

    differentiable = True

    def test_definition_has_the_gradients_of_its_outputs(self, small):
        call, inputs = small()
        with using("reference"):
            check(torch.autograd.gradcheck, call, inputs)

    def test_gradients_of_gradients(self, small):
        call, inputs = small()
        with using("chunked"):
            check(partial(torch.autograd.gradgradcheck, fast_mode=True), call, inputs)

    def test_gradients_of_gradients_leave_the_triton_form(self, small):
        """Twice differentiated through the Triton form gives what the chunked form gives."""
        call, inputs = small()
        inputs = placed(inputs)
        found = []
        for name in ("chunked", "triton"):
            leaves = [x.detach().clone().requires_grad_() if moves(x) else x for x in inputs.values()]
            wanted = [x for x in leaves if moves(x)]
            with using(name):
                outputs = call(**dict(zip(inputs, leaves, strict=True)))
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                total = sum(y.abs().square().sum() for y in outputs)
                first = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
                second = sum(g.abs().square().sum() for g in first)
                found.append(torch.autograd.grad(second, wanted, allow_unused=True, materialize_grads=True))
        for chunked, triton in zip(*found, strict=True):
            close(triton, chunked, 1e-4)


def check(checker, call, inputs):
    """`checker` (gradcheck, gradgradcheck) over the floating inputs, in float64."""
    wide = widened(inputs)
    names = [n for n, x in wide.items() if moves(x)]

    def run(*leaves):
        outputs = call(**{**wide, **dict(zip(names, leaves, strict=True))})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(y for y in outputs if y.requires_grad)

    assert checker(run, [wide[n].detach().clone().requires_grad_() for n in names])


def recorded(call, inputs, name, monkeypatch):
    """The torch ops of one form that a call runs, each with its arguments."""
    seen = []
    original = op.Form.__call__

    def record(self, *args):
        seen.append((self.op, args))
        return original(self, *args)

    monkeypatch.setattr(op.Form, "__call__", record)
    with using(name):
        call(**placed(inputs))
    assert seen, f"no torch op ran in the {name} form"
    return seen


def wrong(call, inputs, error, argument, **changes):
    """A mistake in one argument raises one clear line that names the argument."""
    with pytest.raises(error, match=argument) as caught:
        call(**{**inputs, **changes})
    assert "\n" not in str(caught.value)
