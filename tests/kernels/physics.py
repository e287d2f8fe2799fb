"""How exact a kernel must be: about as exact as plain torch in the same dtype, judged against float64.

`chain` runs one call with the definition in float64, the definition in the given dtype, and a form of the kernel, and
compares every output and every input gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DRAWS = 8


class Errors:
    """The largest errors of ours and of plain torch, by name, over any number of draws.

    eps: of the dtype the call computes in, where that is coarser than the result's: a state in fp32 that bf16 inputs
    made has been through products of bf16 numbers.
    """

    def __init__(self, eps: float = 0.0) -> None:
        self.eps = eps
        self.largest: dict[str, tuple[float, float, float]] = {}  # ours, plain torch's, the floor

    def add(self, what: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, want {tuple(exact.shape)}"
        assert ours.dtype == plain.dtype, f"{what}: dtype {ours.dtype}, want {plain.dtype}"
        if exact.numel() == 0:
            return
        if not exact.is_floating_point() and not exact.is_complex():
            assert torch.equal(ours, exact), f"{what}: not the same integers"
            return
        wide = torch.complex128 if exact.is_complex() else torch.float64
        error, allowed = ((x.to(wide) - exact).abs().max().item() for x in (ours, plain))
        error = error if ours.isfinite().all() else torch.inf
        floor = 4 * max(self.eps, torch.finfo(ours.dtype).eps) * exact.abs().max().item()
        self.largest[what] = tuple(map(max, (error, allowed, floor), self.largest.get(what, (0.0, 0.0, 0.0))))

    def wrong(self) -> str:
        """What is more than twice as wrong as plain torch, with a floor of 4 eps of the largest exact value."""
        for what, (error, allowed, floor) in self.largest.items():
            if error > max(2 * allowed, floor):
                return f"{what}: error {error:.3g}, plain torch {allowed:.3g}, floor {floor:.3g}"
        return ""


def assert_as_good(ours: Tensor, plain: Tensor, exact: Tensor, what: str = "result", eps: float = 0.0) -> None:
    errors = Errors(eps)
    errors.add(what, ours, plain, exact)
    assert not errors.wrong(), errors.wrong()


def judge(measure: Callable[[int, Errors], None], eps: float = 0.0, anywhere: Callable[[bool], bool] = bool) -> None:
    """Asserts that what `measure(draw, errors)` adds is as good as plain torch.

    The largest error of a few numbers is chance, plain torch's as much as ours, and another one on each machine. So
    where the first draw is not good enough, the largest errors of DRAWS draws decide. anywhere: whether any of the
    processes that measure together saw something wrong.
    """
    errors = Errors(eps)
    measure(0, errors)
    if anywhere(bool(errors.wrong())):
        for draw in range(1, DRAWS):
            measure(draw, errors)
    assert not errors.wrong(), errors.wrong()


@contextmanager
def using(form: str) -> Iterator[None]:
    """Public functions run this form: reference, chunked or triton. A call that a form does not take is an error."""
    before, op.FORM = op.FORM, form
    try:
        yield
    finally:
        op.FORM = before


def results(call: Callable, inputs: dict[str, Tensor | None], differentiable: bool = True) -> dict[str, Tensor]:
    """Outputs of `call(**inputs)` and gradients of its floating inputs under fixed random output gradients."""
    leaves = {name: x.detach().clone().requires_grad_(differentiable) if moves(x) else x for name, x in inputs.items()}
    outputs = call(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    if not differentiable:
        return named
    wanted = {name: x for name, x in leaves.items() if moves(x)}
    draw = torch.Generator().manual_seed(7)
    grads = [torch.randn(y.shape, generator=draw, dtype=torch.bfloat16).to(y) for y in outputs]
    moving = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]  # not a state of no tokens
    found = torch.autograd.grad(
        [y for y, _ in moving],
        list(wanted.values()),
        [g for _, g in moving],
        allow_unused=True,
        materialize_grads=True,
    )
    return named | {f"gradient of {name}": g for name, g in zip(wanted, found, strict=True)}


def chain(
    call: Callable,
    inputs: dict[str, Tensor | None],
    form: str = "chunked",
    differentiable: bool = True,
) -> dict[str, Tensor]:
    """Hold a form to the definition on these inputs; returns its results."""
    inputs = placed(inputs)
    first: dict[str, Tensor] = {}

    def measure(draw: int, errors: Errors) -> None:
        drawn = shaken(inputs, draw)
        with using("reference"):
            exact, plain = (results(call, x, differentiable) for x in (widened(drawn), drawn))
        with using(form):
            ours = results(call, drawn, differentiable)
        for what, x in ours.items():
            errors.add(f"{form}: {what}", x, plain[what], exact[what])
            first.setdefault(what, x)

    judge(measure, max((torch.finfo(x.dtype).eps for x in inputs.values() if moves(x)), default=0.0))
    return first


def moves(x: Tensor | None) -> bool:
    """Whether `x` can have a gradient."""
    return x is not None and (x.is_floating_point() or x.is_complex())


def placed(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The inputs on the device under test."""
    return {n: x if x is None else x.to(DEVICE) for n, x in inputs.items()}


def shaken(inputs: dict[str, Tensor | None], draw: int) -> dict[str, Tensor | None]:
    """The same problem with other roundings: each floating number up to two last places smaller. Draw 0: as it is."""
    if draw == 0:
        return inputs
    random = torch.Generator().manual_seed(draw)

    def smaller(x: Tensor) -> Tensor:
        return x * (1 - 2 * torch.finfo(x.dtype).eps * torch.rand(x.shape, generator=random)).to(x)

    return {n: smaller(x) if moves(x) else x for n, x in inputs.items()}


def widened(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The inputs in double precision."""
    return {n: as_dtype(x, torch.float64) for n, x in inputs.items()}


def as_dtype(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Floating tensors in `dtype`, complex ones in the complex type of its parts, others as they are."""
    if not moves(x):
        return x
    return x.to(dtype.to_complex() if x.is_complex() else dtype)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to float32 rounding, relative to the largest value."""
    torch.testing.assert_close(
        a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item() if b.numel() else 1.0)
    )
