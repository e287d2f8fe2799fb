"""Kernels under test: Triton's interpreter where there is no GPU, and memory that shows when it is read unwritten."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any is imported

KERNELS = str(Path(__file__).parents[2] / "kernels")


def pytest_generate_tests(metafunc):
    """`case`, `small` and `recurrent` are each entry of a class's tables, `form` each form but the definition."""
    for fixture, table in (("case", "CASES"), ("small", "SMALL"), ("recurrent", "RECURRENTS")):
        if fixture in metafunc.fixturenames and hasattr(metafunc.cls, table):
            found = getattr(metafunc.cls, table)
            metafunc.parametrize(fixture, list(found.values()), ids=list(found))
    if "form" in metafunc.fixturenames:
        metafunc.parametrize("form", ["chunked", "triton"])


def poisoned(make):
    def call(*args, **options):
        made = make(*args, **options)
        asked = sys._getframe(1).f_code.co_filename
        return made.fill_(torch.nan) if asked.startswith(KERNELS) and made.is_floating_point() else made

    return call


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Uninitialised memory asked for by kernels/ comes back as NaN."""
    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(place, name, poisoned(getattr(place, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def bfloat16_dot():
    """Triton's interpreter holds bf16 as 16-bit integers and its dot multiplies them as such: give it floats."""
    if torch.cuda.is_available():
        return
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = numpy.ascontiguousarray(x.data).astype(numpy.uint32) << 16
        return TensorHandle(bits.view(numpy.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


@pytest.fixture(autouse=True, scope="session")
def whole_tile_scan():
    """Triton's interpreter scans one scalar at a time: double the reach of whole tiles instead, as a GPU does."""
    if torch.cuda.is_available():
        return
    import numpy
    from triton.runtime.interpreter import ScanOps

    def generic_scan(self, inputs):
        dtypes, data = [x.dtype for x in inputs], [x.handle.data for x in inputs]
        place = numpy.arange(data[0].shape[self.axis]).reshape(
            [-1 if i == self.axis else 1 for i in range(data[0].ndim)]
        )
        reach = 1
        while reach < place.size:
            before = [numpy.where(place < reach, x, numpy.roll(x, reach, self.axis)) for x in data]
            pairs = (zip(x, dtypes, strict=True) for x in (before, data))
            found = self.combine_fn.fn(*(self.to_tensor(x, dtype) for pair in pairs for x, dtype in pair))
            found = found if isinstance(found, tuple) else (found,)
            data = [numpy.where(place < reach, x, f.handle.data) for x, f in zip(data, found, strict=True)]
            reach *= 2
        return [self.to_tensor(x, dtype) for x, dtype in zip(data, dtypes, strict=True)]

    ScanOps.generic_scan = generic_scan
