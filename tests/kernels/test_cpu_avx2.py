"""The C++ as a processor without AVX-512 has it: whoever has more never runs those lines."""

import platform
import subprocess
import sys

import pytest

RUN = """
import sys
import pytest
from kernels import cpu
cpu.FLAGS = (*cpu.FLAGS, "-march=x86-64-v3")  # the last one counts
assert cpu.available()
sys.exit(pytest.main(["-p", "no:cacheprovider", "tests/kernels/test_cpu.py", "tests/kernels/test_packed_linear.py"]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of that processor's instructions")
def test_the_same_tests_pass():
    run = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout
