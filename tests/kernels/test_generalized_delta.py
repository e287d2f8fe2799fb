"""generalized_delta: each form against the definition, the recurrence in row form, and the gated delta rule."""

import pytest
import torch
from torch.nn.functional import normalize

from kernels import gated_delta, generalized_delta
from tests.kernels.physics import DEVICE, close
from tests.kernels.recurrent import Memory, cases, small
from tests.kernels.suite import wrong


def inputs(tokens=63, rows=2, heads=2, key=12, value=20, state=True, gate=0.6):
    """As RWKV-7 draws them: a is a unit key, negated, and b the same key times a rate per channel."""
    unit = normalize(torch.randn(rows, tokens, heads, key), dim=-1)
    return {
        "q_BTHK": normalize(torch.randn(rows, tokens, heads, key), dim=-1),
        "k_BTHK": normalize(torch.randn(rows, tokens, heads, key), dim=-1),
        "v_BTHV": torch.randn(rows, tokens, heads, value),
        "decay": -torch.rand(rows, tokens, heads, key) * gate,
        "a_BTHK": -unit,
        "b_BTHK": unit * torch.rand(rows, tokens, heads, key),
        "state_BHKV": torch.randn(rows, heads, key, value) if state else None,
    }


def call(decay, **x):
    return generalized_delta(decay_BTHK=decay, **x, scale=0.5)


@pytest.fixture
def decays():
    return {}


class TestGeneralizedDelta(Memory):
    CASES = cases(call, inputs, channel={})
    SMALL = small(call, inputs, channel={})
    inputs, call = staticmethod(inputs), staticmethod(call)


def test_is_the_recurrence_in_row_form():
    """M_t = M_{t-1} (diag(exp(w)) + a b^T) + v k^T by hand, one head, where our S is M^T."""
    x = {n: v.double().to(DEVICE) for n, v in inputs(40, rows=1, heads=1).items()}
    q, k, v, decay, a, b = (y[0, :, 0] for y in list(x.values())[:6])
    memory, outputs = x["state_BHKV"][0, 0].T, []
    for t in range(40):
        memory = memory @ (decay[t].exp().diag() + torch.outer(a[t], b[t])) + torch.outer(v[t], k[t])
        outputs.append(0.5 * memory @ q[t])
    y, state = call(**x)
    close(y[0, :, 0], torch.stack(outputs), 1e-12)
    close(state[0, 0], memory.T, 1e-12)


def test_contains_the_gated_delta_rule():
    x = {n: v.double().to(DEVICE) for n, v in inputs(70).items()}
    decay, beta = (torch.rand(2, 70, 2, dtype=torch.float64, device=DEVICE) for _ in range(2))
    decay, k, state = -decay, x["a_BTHK"], x["state_BHKV"]
    y, after = generalized_delta(
        x["q_BTHK"],
        k * beta[..., None],
        x["v_BTHV"],
        decay[..., None].expand_as(k),
        k * decay[..., None].exp(),
        -k * beta[..., None],
        state_BHKV=state,
    )
    expected, expected_after = gated_delta(x["q_BTHK"], k, x["v_BTHV"], decay, beta, scale=1.0, state_BHKV=state)
    close(y, expected, 1e-12)
    close(after, expected_after, 1e-12)


def test_mistakes_name_the_argument():
    x = inputs(4)
    wrong(call, x, ValueError, "a_BTHK", a_BTHK=x["a_BTHK"][..., :2])
    wrong(call, x, ValueError, "v_BTHV", v_BTHV=x["v_BTHV"][:, :2])
    wrong(call, x, ValueError, "keep=9", keep=9)
    wrong(call, x, TypeError, "segments_BT", segments_BT=torch.zeros(2, 4))
