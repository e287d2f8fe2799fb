"""The Triton kernels compile for a GPU at the sizes of the benchmark; see `hopper.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import bench

ROOT = Path(__file__).parents[2]


def compiled(*names):
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.hopper", *names]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_kernels_of_each_kind_compile():
    out = compiled("norm", "swiglu", "wkv4", "conv1d")
    assert "kernels.norm.triton._backward" in out and " 0 failed" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.registered())
def test_compiles(name):
    compiled(name)
