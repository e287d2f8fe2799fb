"""gated_delta: each form against the definition, and the rule in matrix form."""

import pytest
import torch
from torch.nn.functional import normalize

from kernels import gated_delta, linear_attention
from tests.kernels.physics import DEVICE, close
from tests.kernels.recurrent import Memory, cases, small
from tests.kernels.suite import wrong

HEAD, CHANNEL, NONE = {"decay": "head"}, {"decay": "channel"}, {"decay": None}


def inputs(tokens=63, rows=2, heads=2, key=12, value=20, state=True, decay="head", gate=0.3):
    drawn = {"head": torch.rand(rows, tokens, heads), "channel": torch.rand(rows, tokens, heads, key)}
    return {
        "q_BTHK": normalize(torch.randn(rows, tokens, heads, key), dim=-1),
        "k_BTHK": normalize(torch.randn(rows, tokens, heads, key), dim=-1),
        "v_BTHV": torch.randn(rows, tokens, heads, value),
        "decay": -gate * drawn[decay] if decay else None,
        "beta_BTH": torch.rand(rows, tokens, heads),
        "state_BHKV": torch.randn(rows, heads, key, value) if state else None,
    }


@pytest.fixture(params=[HEAD, CHANNEL], ids=["head", "channel"])
def decays(request):
    return request.param


class TestGatedDelta(Memory):
    CASES = cases(gated_delta, inputs, head=HEAD, channel=CHANNEL, none=NONE)
    SMALL = small(gated_delta, inputs, head=HEAD, channel=CHANNEL, none=NONE)
    inputs, call = staticmethod(inputs), staticmethod(gated_delta)


@pytest.mark.parametrize("kind", ["head", "channel", None])
def test_is_a_product_of_matrices(kind):
    """S = (1 - beta k k^T) diag(gate) S + beta k v^T, one head by hand."""
    x = {n: v if v is None else v.double().to(DEVICE) for n, v in inputs(40, rows=1, heads=1, decay=kind).items()}
    q, k, v, decay, beta = (None if y is None else y[0, :, 0] for y in list(x.values())[:5])
    memory, outputs = x["state_BHKV"][0, 0], []
    one = torch.eye(12, dtype=torch.float64, device=DEVICE)
    for t in range(40):
        gate = one if decay is None else decay[t].exp() * one
        memory = (one - beta[t] * torch.outer(k[t], k[t])) @ gate @ memory + beta[t] * torch.outer(k[t], v[t])
        outputs.append(memory.T @ q[t] / 12**0.5)
    y, state = gated_delta(**x)
    close(y[0, :, 0], torch.stack(outputs), 1e-12)
    close(state[0, 0], memory, 1e-12)


def test_one_rate_per_head_is_the_same_for_every_channel():
    x = inputs(70)
    wide = {**x, "decay": x["decay"][..., None].expand_as(x["k_BTHK"])}
    for head, channel in zip(gated_delta(**x), gated_delta(**wide), strict=True):
        close(channel, head)


def test_a_key_asked_again_gives_what_was_written_last():
    x = inputs(30, decay=None, state=False)
    x["k_BTHK"], x["beta_BTH"] = x["k_BTHK"][:, :1].expand_as(x["k_BTHK"]), torch.ones(2, 30, 2)
    x["q_BTHK"] = x["k_BTHK"]
    close(gated_delta(**x, scale=1.0)[0], x["v_BTHV"])
    plain = {n: v for n, v in x.items() if n != "beta_BTH"}
    assert not torch.allclose(linear_attention(**plain)[0], x["v_BTHV"], atol=0.1)


def test_mistakes_name_the_argument():
    x = inputs(4)
    wrong(gated_delta, x, ValueError, "beta_BTH", beta_BTH=x["beta_BTH"][:, :2])
    wrong(gated_delta, x, ValueError, "decay", decay=x["decay"][:, :2])
    wrong(gated_delta, x, TypeError, "v_BTHV", v_BTHV=x["v_BTHV"].long())
    wrong(gated_delta, x, ValueError, "keep=9", keep=9)
    wrong(gated_delta, x, TypeError, "segments_BT", segments_BT=torch.zeros(2, 4))
