"""What the tests of parts share: random sizes from a seed that is printed when a test fails, and comparing."""

import os
import random

import pytest
import torch
import transformers.integrations

# References run transformers' own torch code: with fla installed it would call kernels that need a GPU. Its modules
# look for them when they are imported, which is after this file.
transformers.integrations.use_kernel_func_from_hub_with_fallback = lambda *names: lambda function: function


DRAWS = int(os.environ.get("DRAWS", "1"))  # of each test that draws its sizes; `make slow` asks for more


def pytest_generate_tests(metafunc):
    if "pick" in metafunc.fixturenames and DRAWS > 1:
        metafunc.parametrize("draw", range(DRAWS))


@pytest.fixture
def draw():
    """The number of the draw; there is one unless DRAWS says more."""
    return 0


@pytest.fixture
def seed():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return seed


@pytest.fixture
def pick(draw):
    """Random choices; torch draws from the same seed."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)
