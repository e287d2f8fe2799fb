"""How exact a kernel must be: about as exact as plain torch in the same dtype, judged against float64.

`chain` runs one call three times, the definition in float64, the definition in the given dtype, and the kernel, and
compares every output and every input gradient.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import op


def assert_as_good(ours: Tensor, plain: Tensor, exact: Tensor, what: str = "result") -> None:
    """Max error of `ours` at most twice that of `plain`, with a floor of 4 eps of the largest exact value."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, want {tuple(exact.shape)}"
    assert ours.dtype == plain.dtype, f"{what}: dtype {ours.dtype}, want {plain.dtype}"
    if exact.numel() == 0:
        return
    assert ours.isfinite().all(), f"{what}: not finite"
    floor = 4 * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, plain))
    assert error <= max(2 * allowed, floor), f"{what}: error {error:.3g}, plain torch {allowed:.3g}, floor {floor:.3g}"


@contextmanager
def definition():
    """Public functions run their reference."""
    before, op.FORM = op.FORM, "reference"
    try:
        yield
    finally:
        op.FORM = before


def results(call: Callable, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Outputs of `call(**inputs)` and gradients of its floating inputs under fixed random output gradients."""
    leaves = {
        name: x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    outputs = call(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    draw = torch.Generator().manual_seed(7)
    grads = [torch.randn(y.shape, generator=draw, dtype=torch.bfloat16).to(y.dtype) for y in outputs]
    moving = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]  # not a state of no tokens
    found = torch.autograd.grad(
        [y for y, _ in moving],
        list(wanted.values()),
        [g for _, g in moving],
        allow_unused=True,
        materialize_grads=True,
    )
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"gradient of {name}": g for name, g in zip(wanted, found, strict=True)}


def chain(call: Callable, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Hold the kernel to its definition on these inputs; returns the kernel's results."""
    wide = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in inputs.items()}
    with definition():
        exact, plain = results(call, wide), results(call, inputs)
    ours = results(call, inputs)
    for name, x in ours.items():
        assert_as_good(x, plain[name], exact[name], name)
    return ours


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to float32 rounding, relative to the largest value."""
    torch.testing.assert_close(
        a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item() if b.numel() else 1.0)
    )
