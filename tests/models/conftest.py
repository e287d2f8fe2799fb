"""What the tests of parts share: random sizes from a seed that is printed when a test fails, and comparing."""

import random

import pytest
import torch


@pytest.fixture
def pick():
    """Random choices; torch draws from the same seed."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)
