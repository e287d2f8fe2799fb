"""An operation in three forms behind one call, each form a torch op that `torch.compile` and checkpointing see through.

`reference` is the definition and stays plain torch. `chunked` (CPUs) and `triton` (GPUs) become torch ops. Forward runs
the form without recording. Backward is a second op: a hand-written gradient where there is one, else the form again
with recording on. When autograd records inside backward (gradients of gradients), plain torch runs there, so that
everything behind it is ordinary autograd.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

FORMS = ("", "reference", "chunked", "triton")
FORM = os.environ.get("EDIFICE_KERNELS", "")
if FORM not in FORMS:
    raise ValueError(f"EDIFICE_KERNELS={FORM!r}: set it to reference, chunked or triton, or leave it unset")


class Op:
    """One operation. Called with the same positional arguments whatever the form; the first one is a tensor.

    reference, chunked: functions of the same arguments; `chunked` is annotated with tensors, optional tensors, ints,
             floats, bools and strings, and returns a tensor or a tuple of them.
    fake:    same arguments; empty outputs of chunked's shapes, dtypes and devices.
    grad:    (args, outputs, grads, needs) -> a gradient for each True of `needs` (one bool per argument), in order.
    saved:   how many trailing outputs of chunked exist for `grad` alone; the caller never sees them.
    twice:   a form that autograd can differentiate any number of times, where `chunked` is not one.
    differentiable: False for inference and selection: no gradient is registered.

    `kernels/<name>/triton.py` is loaded when a GPU or EDIFICE_KERNELS asks for it. It has `forward`, annotated as
    `chunked` is, and `grad` where the op is differentiable. If forward returns tensors for grad beyond the op's own, it
    also has `SAVED`, their number, and its own `fake`; with `WHOLE = True` grad is given all outputs, the op's own too.
    `takes(*args)`, where there is one, says which calls it serves; on a GPU the others, and float64, go to `chunked`.
    """

    def __init__(
        self,
        name: str,
        reference: Callable,
        chunked: Callable,
        fake: Callable,
        *,
        grad: Callable | None = None,
        saved: int = 0,
        twice: Callable | None = None,
        differentiable: bool = True,
    ) -> None:
        self.name, self.reference, self.differentiable = name, reference, differentiable
        self._fake, self._twice = fake, twice or chunked
        self.chunked = Form(name, chunked, fake, grad, saved, self._twice, differentiable)
        self._triton = self._takes = None
        if torch.cuda.is_available():
            self.load_triton()

    def __call__(self, *args):
        form = FORM or ("triton" if args[0].is_cuda and self._serves(args) else "chunked")
        if form == "reference":
            return self.reference(*args)
        if form == "chunked":
            return self.chunked(*args)
        if self._triton is None:
            self.load_triton()
        if FORM and not self._serves(args):
            raise ValueError(f"{self.name}: EDIFICE_KERNELS=triton, but the Triton form does not take these arguments")
        return self._triton(*args)

    @property
    def triton(self) -> "Form":
        """The GPU form."""
        if self._triton is None:
            self.load_triton()
        return self._triton

    def load_triton(self) -> None:
        """Import `kernels/<name>/triton.py` and register what it has."""
        module = importlib.import_module(f"kernels.{self.name}.triton")
        self._takes = getattr(module, "takes", None)
        fake = getattr(module, "fake", self._fake)
        grad = module.grad if self.differentiable else None
        saved = getattr(module, "SAVED", 0)
        name = f"{self.name}_triton"
        whole = getattr(module, "WHOLE", False)
        self._triton = Form(name, module.forward, fake, grad, saved, self._twice, self.differentiable, whole)

    def _serves(self, args: Sequence) -> bool:
        if any(isinstance(x, Tensor) and x.dtype in (torch.float64, torch.complex128) for x in args):
            return False
        return self._takes is None or self._takes(*args)


class Form:
    """One form of an op: the function itself, and the torch op made of it."""

    def __init__(self, name, run, fake, grad, saved, twice, differentiable, whole=False) -> None:
        self.run, self.saved = run, saved
        self.op = register(
            name, run, fake, grad=grad, saved=saved, twice=twice, differentiable=differentiable, whole=whole
        )

    def __call__(self, *args):
        # Where nothing records and nothing is traced, as in a decode step, the function itself: an op's dispatch costs
        # more there than a small tensor's arithmetic. Autocast stays outside the op.
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        recorded = recorded or torch.is_autocast_enabled(args[0].device.type)
        try:
            outputs = (self.op if recorded else self.run)(*args)
        except (DataDependentOutputException, DynamicOutputShapeException):
            outputs = self.op(*args)  # a tape is recorded, without numbers, which this function looks at: one op then
        if not self.saved:
            return outputs
        outputs = outputs[: -self.saved]
        return outputs[0] if len(outputs) == 1 else outputs


def register(
    name: str,
    form: Callable,
    fake: Callable,
    *,
    grad: Callable | None = None,
    saved: int = 0,
    twice: Callable | None = None,
    differentiable: bool = True,
    whole: bool = False,
) -> Callable:
    """Register `edifice::name` and `edifice::name_backward`, arguments as of `Op`; returns the op."""
    schema = torch.library.infer_schema(form, mutates_args=())
    forward = torch.library.custom_op(f"edifice::{name}", given_back(form), mutates_args=(), schema=schema)
    forward.register_fake(fake)
    if not differentiable:
        return forward
    arguments = forward._opoverload._schema.arguments
    places = [i for i, a in enumerate(arguments) if "Tensor" in str(a.type)]
    inputs = ", ".join(f"{_schema_type(a.type)} {a.name}" for a in arguments)

    def run(*everything):
        args, (outputs, grads, needs) = everything[: len(arguments)], everything[len(arguments) :]
        with as_given():
            if grad is not None:
                found = grad(args, outputs, grads, needs)
            else:
                found = recompute(form, args, grads, needs, again=False)
        return _owned(found, (*args, *outputs, *grads))

    backward = torch.library.custom_op(
        f"edifice::{name}_backward",
        run,
        mutates_args=(),
        schema=f"({inputs}, Tensor[] outputs, Tensor[] grads, bool[] needs) -> Tensor[]",
    )

    def fake_backward(*everything):
        needs = everything[-1]
        return [torch.empty_like(everything[i], memory_format=torch.contiguous_format) for i in places if needs[i]]

    backward.register_fake(fake_backward)

    def setup_context(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        beyond = outputs[len(outputs) - saved :] if saved else ()
        kept = outputs if whole else beyond
        if saved:
            ctx.mark_non_differentiable(*beyond)
        ctx.constants = [None if i in places else value for i, value in enumerate(inputs)]
        ctx.save_for_backward(*(inputs[i] for i in places), *kept)

    def run_backward(ctx, *grads):
        tensors = ctx.saved_tensors
        args = list(ctx.constants)
        for i, tensor in zip(places, tensors, strict=False):
            args[i] = tensor
        needs = [i in places and need for i, need in enumerate(ctx.needs_input_grad)]
        grads = grads[: len(grads) - saved]
        if torch.is_grad_enabled():
            with as_given():
                found = recompute(twice or form, args, grads, needs, again=True)
        else:
            found = backward(*args, list(tensors[len(places) :]), list(grads), needs)
        found = iter(found)
        return tuple(next(found) if need else None for need in needs)

    forward.register_autograd(run_backward, setup_context=setup_context)
    return forward


def recompute(form: Callable, args: Sequence, grads: Sequence[Tensor], needs: Sequence[bool], again: bool):
    """The gradients of `form`, by running it with recording on. `again`: they can be differentiated in turn."""
    with recording():
        # A fresh alias of each input: an input computed from another one must not add that path a second time.
        fresh = [x.view_as(x) if again else x.detach() for x in _needed(args, needs)]
        if not again:
            fresh = [x.requires_grad_() for x in fresh]
        given = iter(fresh)
        outputs = form(*(next(given) if need else x for x, need in zip(args, needs, strict=True)))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(out, g) for out, g in zip(outputs, grads, strict=False) if out.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in fresh]
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            fresh,
            [g for _, g in pairs],
            create_graph=again,
            allow_unused=True,
            materialize_grads=True,
        )
    return found


def given_back(form: Callable) -> Callable:
    """`form` outside autocast, and its outputs as an op may return them."""

    @functools.wraps(form)
    def run(*args):
        with as_given():
            outputs = form(*args)
        return tuple(_owned(outputs, args)) if isinstance(outputs, tuple) else _owned([outputs], args)[0]

    return run


as_given = torch._C._DisableAutocast  # an op's types are those of its arguments: autocast must not narrow its products


@contextmanager
def recording() -> Iterator[None]:
    """Autograd inside the body of an op: torch switches it off there at the level of its dispatcher."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _owned(outputs: Sequence[Tensor], inputs: Sequence) -> list[Tensor]:
    """What an op may return: contiguous, as its fake says, and with memory of its own."""
    taken = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor)}
    owned = []
    for x in outputs:
        x = x.contiguous()
        x = x.clone() if x.untyped_storage()._cdata in taken else x
        taken.add(x.untyped_storage()._cdata)
        owned.append(x)
    return owned


def _needed(args: Sequence, needs: Sequence[bool]) -> list[Tensor]:
    return [x for x, need in zip(args, needs, strict=True) if need]


def _schema_type(kind) -> str:
    """The schema spelling of an argument's type."""
    text = str(kind)
    if text.startswith("Optional["):
        return _schema_type(text[len("Optional[") : -1]) + "?"
    return {"int": "SymInt"}.get(text, text)
