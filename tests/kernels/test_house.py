"""Every op is whole: three forms, a benchmark, tests by the suite, one public name."""

import importlib
from pathlib import Path

import pytest
import torch

import kernels
from kernels import bench, op
from tests.kernels import suite
from tests.kernels.physics import DEVICE, moves, results, using

FOLDER = Path(kernels.__file__).parent
OPS = sorted(path.parent.name for path in FOLDER.glob("*/reference.py"))


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_whole(name):
    for file in ("chunked.py", "triton.py", "bench.py"):
        assert (FOLDER / name / file).exists(), f"kernels/{name} has no {file}"
    tests = vars(importlib.import_module(f"tests.kernels.test_{name}")).values()
    classes = [x for x in tests if isinstance(x, type) and issubclass(x, suite.Forward) and hasattr(x, "CASES")]
    assert classes, f"tests/kernels/test_{name}.py has no class of the suite"
    registered = importlib.import_module(f"kernels.{name}")._op
    assert isinstance(registered, op.Op) and registered.name == name
    assert registered.differentiable == any(issubclass(c, suite.Differentiable) for c in classes)


def test_public_names_are_functions_with_a_docstring():
    for name in kernels.__all__:
        assert callable(getattr(kernels, name)) and getattr(kernels, name).__doc__, name


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.registered())
def test_benchmarked_shapes_are_right_with_their_gradients(name):
    """At the sizes of the benchmark, in its dtype: outputs and gradients against the chunked form in float64."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    for case in importlib.import_module(f"kernels.{name}.bench").cases(bench.Bench(DEVICE, dtype)):
        if not case.truth:
            continue
        inputs = case.inputs()
        wide = {n: x.double() if moves(x) else x for n, x in inputs.items()}
        ours = results(case.run, inputs, bool(case.backward))
        with using("chunked"):
            exact = results(case.run, wide, bool(case.backward))
        for what, want in exact.items():
            if not want.numel() or not moves(want):
                assert torch.equal(ours[what], want), f"{case.shape}: {what}"
                continue
            error = (ours[what].to(want.dtype) - want).norm() / want.norm().clamp(min=1e-30)
            assert error <= 4 * torch.finfo(dtype).eps + 1e-5, f"{case.shape}: {what}: {error:.2g}"
