"""linear_attention: each form against the definition, the normaliser, and the papers' other forms."""

import pytest
import torch
from torch.nn.functional import normalize

from kernels import linear_attention
from tests.kernels.physics import DEVICE, chain, close
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
        "state_BHKV": torch.randn(rows, heads, key, value) if state else None,
    }


def call(**x):
    return linear_attention(**x, scale=0.5)


@pytest.fixture(params=[HEAD, CHANNEL], ids=["head", "channel"])
def decays(request):
    return request.param


class TestLinearAttention(Memory):
    CASES = cases(call, inputs, head=HEAD, channel=CHANNEL, none=NONE)
    SMALL = small(call, inputs, head=HEAD, channel=CHANNEL, none=NONE)
    inputs, call = staticmethod(inputs), staticmethod(call)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_is_masked_attention_without_softmax(kind):
    """The parallel form of the papers: y = ((q k^T) * D) v with D_ij the product of the gates between."""
    x = {n: v.double().to(DEVICE) for n, v in inputs(70, state=False, decay=kind).items() if v is not None}
    q, k, v, decay = (y.transpose(1, 2) for y in x.values())
    decay = decay if kind == "channel" else decay[..., None].expand_as(q)
    scores = torch.zeros(2, 2, 70, 70, dtype=torch.float64, device=DEVICE)
    for i in range(70):
        for j in range(i + 1):
            between = decay[:, :, j + 1 : i + 1].sum(-2).exp()
            scores[:, :, i, j] = (q[:, :, i] * k[:, :, j] * between).sum(-1)
    left = torch.stack([decay[:, :, j + 1 :].sum(-2).exp() for j in range(70)], 2)
    y, state = call(**x)
    close(y, 0.5 * (scores @ v).transpose(1, 2), 1e-12)
    close(state, (k * left).transpose(2, 3) @ v, 1e-12)


def test_normalised_is_attention_with_kernel_scores(form):
    """y_t = sum_i (q_t . k_i) v_i / sum_i (q_t . k_i), as attention normalises, with positive keys and queries."""
    x = inputs(20, rows=1, state=False, decay=None)
    x["q_BTHK"], x["k_BTHK"] = x["q_BTHK"].abs(), x["k_BTHK"].abs()
    y, state = chain_normalised(x, form)
    scores = torch.einsum("bthk,bshk->bhts", x["q_BTHK"], x["k_BTHK"]).tril()
    close(y.cpu(), torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), x["v_BTHV"]))
    close(state[..., -1].cpu(), x["k_BTHK"].sum(1))


def chain_normalised(x, form):
    found = chain(lambda **given: linear_attention(**given, normalize=True), x, form)
    return found["output 0"], found["output 1"]


def test_nothing_to_divide_by_is_zero():
    x = inputs(3, state=False)
    y, _ = linear_attention(x["q_BTHK"], torch.zeros_like(x["k_BTHK"]), x["v_BTHV"], normalize=True)
    assert torch.equal(y, torch.zeros_like(y))


def test_is_the_mlstm():
    """The mLSTM cell as its paper states it, gates exp(i) and sigmoid(f), unstabilised in float64."""
    x = inputs(40, rows=1, heads=1, state=False)
    q, k, v = (x[n][0, :, 0].double() for n in ("q_BTHK", "k_BTHK", "v_BTHV"))
    i, f = torch.randn(40).double() * 3, torch.nn.functional.logsigmoid(torch.randn(40).double() * 2)
    memory, normaliser, outputs = torch.zeros(20, 12).double(), torch.zeros(12).double(), []
    for t in range(40):
        memory = f[t].exp() * memory + i[t].exp() * torch.outer(v[t], k[t])
        normaliser = f[t].exp() * normaliser + i[t].exp() * k[t]
        outputs.append(memory @ q[t] / torch.clamp((normaliser @ q[t]).abs(), min=1.0))
    m = [i[0]]
    for t in range(1, 40):
        m.append(torch.maximum(f[t] + m[-1], i[t]))
    m = torch.stack(m)
    decay = f + torch.cat([m[:1], m[:-1]]) - m
    y, _ = linear_attention(
        q[None, :, None],
        (k * (i - m).exp()[:, None])[None, :, None],
        v[None, :, None],
        decay[None, :, None],
        normalize=True,
        floor_BTH=(-m).exp()[None, :, None],
    )
    close(y[0, :, 0], torch.stack(outputs), 1e-10)


def test_mistakes_name_the_argument():
    x = inputs(4)
    wrong(call, x, ValueError, "decay", decay=x["decay"][:, :2])
    wrong(call, x, ValueError, "decay", decay=torch.randn(2, 4, 2, 5))
    wrong(call, x, ValueError, "state_BHKV", state_BHKV=x["state_BHKV"][..., :3])
    wrong(call, x, ValueError, "keep=9", keep=9)
    wrong(call, x, TypeError, "segments_BT", segments_BT=torch.zeros(2, 4))
    wrong(call, x, ValueError, "floor_BTH", floor_BTH=torch.ones(2, 4, 2))
    wrong(call, x, ValueError, "v_BTHV must be on", v_BTHV=torch.randn(2, 4, 2, 20, device="meta"))
