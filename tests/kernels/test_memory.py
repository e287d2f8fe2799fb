"""Matrix memories that go through a long sequence span by span, one chunk each here, are what they are at once."""

import pytest

from kernels import memory
from tests.kernels.physics import chain
from tests.kernels.test_gated_delta import TestGatedDelta as Gated
from tests.kernels.test_generalized_delta import TestGeneralizedDelta as Generalized
from tests.kernels.test_linear_attention import TestLinearAttention as Linear

CASES = {f"{suite.__name__} {n}": case for suite in (Gated, Generalized, Linear) for n, case in suite.CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_spans(name, monkeypatch):
    monkeypatch.setattr(memory, "SPAN", 1)
    chain(*CASES[name]())
