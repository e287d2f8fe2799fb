"""What the tests of parts share: random sizes from a seed that is printed when a test fails, and comparing."""

import random

import pytest
import torch
import transformers.integrations

# References run transformers' own torch code: with fla installed it would call kernels that need a GPU. Its modules look
# for them when they are imported, which is after this file.
transformers.integrations.use_kernel_func_from_hub_with_fallback = lambda *names: lambda function: function


@pytest.fixture
def pick():
    """Random choices; torch draws from the same seed."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)
