"""gated_delta: chunked against its form, the carried state, documents and padding."""

import pytest
import torch
from torch.nn.functional import normalize

from kernels import gated_delta
from kernels.gated_delta.reference import reference
from tests.kernels.physics import chain, close, using


def inputs(tokens=63, rows=2, heads=2, key=12, value=20, dtype=torch.float32, state=True, gate=0.3):
    q, k = (normalize(torch.randn(rows, tokens, heads, key), dim=-1) for _ in range(2))
    made = {
        "q_BTHK": q,
        "k_BTHK": k,
        "v_BTHV": torch.randn(rows, tokens, heads, value),
        "decay_BTH": -torch.rand(rows, tokens, heads) * gate,
        "beta_BTH": torch.rand(rows, tokens, heads),
    }
    made = {name: x.to(dtype) for name, x in made.items()}
    wide = torch.promote_types(dtype, torch.float32)
    made["state_BHKV"] = torch.randn(rows, heads, key, value, dtype=wide) if state else None
    return made


def packed(rows, tokens):
    """Documents of several lengths with padding in front, inside and at the end; row 0 begins with the carried one."""
    segments_BT = torch.zeros(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        starts = torch.rand(tokens) < 0.08
        starts[0] = row > 0
        segments_BT[row] = starts.cumsum(0)
        segments_BT[row][torch.rand(tokens) < 0.2] = -1
    segments_BT[:, tokens // 3 : tokens // 3 + 3] = -1
    segments_BT[-1, :2] = -1
    segments_BT[-1, -4:] = -1
    return segments_BT


def run(segments=None, keep=0, scale=None):
    return lambda **x: gated_delta(
        *(x[n] for n in ("q_BTHK", "k_BTHK", "v_BTHV", "decay_BTH", "beta_BTH")),
        state_BHKV=x["state_BHKV"],
        segments_BT=segments,
        keep=keep,
        scale=scale,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, keep", [(0, 0), (1, 0), (1, 1), (5, 2), (63, 0), (64, 0), (130, 3)])
@pytest.mark.parametrize("state", [True, False])
def test_chain(tokens, keep, state, dtype):
    chain(run(keep=keep), inputs(tokens, dtype=dtype, state=state))


def test_chain_odd_sizes():
    chain(run(scale=0.7), inputs(63, rows=1, heads=3, key=60, value=60))


@pytest.mark.parametrize("tokens, keep", [(3, 0), (63, 2), (150, 0)])
@pytest.mark.parametrize("state", [True, False])
def test_chain_packed(tokens, keep, state):
    segments = packed(3, tokens) if tokens > 8 else torch.tensor([[0, -1, 0], [-1, 1, 2], [-1, -1, -1]])
    chain(run(segments, keep), inputs(tokens, rows=3, state=state))


def test_documents_and_padding_are_as_if_alone():
    x, segments = inputs(90, rows=1), torch.full((1, 90), -1)
    segments[0, 3:40], segments[0, 44:70], segments[0, 75:88] = 0, 1, 2
    segments[0, 20] = -1
    y, state = run(segments)(**x)
    for number in range(3):
        at = segments[0] == number
        alone = {n: v[:, at] if n != "state_BHKV" else (v if number == 0 else None) for n, v in x.items()}
        y_alone, state_alone = run()(**alone)
        close(y[:, at], y_alone)
    close(state, state_alone)


@pytest.mark.parametrize("cut", [1, 37, 64, 99])
def test_split_anywhere_is_one_pass(cut):
    x = inputs(100)
    sides = [
        {n: (v[:, :cut] if first else v[:, cut:]) for n, v in x.items() if n != "state_BHKV"} for first in (True, False)
    ]
    x["state_BHKV"].requires_grad_()
    y, state = run()(**x)
    y1, middle = run()(**sides[0], state_BHKV=x["state_BHKV"])
    y2, after = run()(**sides[1], state_BHKV=middle)
    close(torch.cat([y1, y2], 1), y)
    close(after, state)
    one, two = (
        torch.autograd.grad(s.square().sum() + z.sum(), x["state_BHKV"])[0]
        for s, z in ((state, y), (after, torch.cat([y1, y2], 1)))
    )
    close(two, one)


def test_keep_is_the_state_of_shorter_calls():
    x, segments = inputs(70, rows=2), packed(2, 70)
    _, kept = run(segments, keep=5)(**x)
    for j in range(6):
        n = 65 + j
        short = {name: v if name == "state_BHKV" else v[:, :n] for name, v in x.items()}
        close(kept[:, j], run(segments[:, :n])(**short)[1])


def test_earlier_outputs_do_not_change_by_a_bit():
    x = inputs(150)
    y = run()(**x)[0]
    for cut in (1, 63, 64, 100):
        other = {n: v if n == "state_BHKV" else torch.cat([v[:, :cut], v[:, cut:] * 0.5], 1) for n, v in x.items()}
        assert torch.equal(run()(**other)[0][:, :cut], y[:, :cut])


def test_rows_are_independent():
    x, segments = inputs(80, rows=3), packed(3, 80)
    y, state = run(segments)(**x)
    y1, state1 = run(segments[1:2])(**{n: v[1:2] for n, v in x.items()})
    close(y1, y[1:2])
    close(state1, state[1:2])


@pytest.mark.parametrize("gate", [0.0, 30.0, torch.inf])
def test_any_decay_is_safe(gate):
    x = inputs(80)
    x["decay_BTH"] = torch.where(torch.rand(2, 80, 2) < 0.3, -gate, x["decay_BTH"])
    if gate == 0.0:
        x["decay_BTH"].zero_()
    chain(run(), x)


def test_gradcheck():
    x = {n: v.double().requires_grad_() for n, v in inputs(6, rows=1, heads=1, key=3, value=2).items()}
    segments = torch.tensor([[0, 0, -1, 1, 1, 2]])
    with using("reference"):
        assert torch.autograd.gradcheck(lambda *v: run(segments)(**dict(zip(x, v, strict=True))), tuple(x.values()))
    assert torch.autograd.gradcheck(lambda *v: run(segments, keep=1)(**dict(zip(x, v, strict=True))), tuple(x.values()))
    assert torch.autograd.gradgradcheck(lambda *v: run(segments)(**dict(zip(x, v, strict=True))), tuple(x.values()))


def test_reference_is_the_equation():
    x = {n: v[:1] for n, v in inputs(5, heads=1).items()}
    q, k, v, decay, beta, state = (x[n][0].double() for n in x)
    s, outputs = state[0], []
    for t in range(5):
        s = decay[t, 0].exp() * s
        s = s + beta[t, 0] * torch.outer(k[t, 0], v[t, 0] - s.T @ k[t, 0])
        outputs.append(s.T @ q[t, 0])
    y, after = reference(*(z.double() for z in x.values()), None, 1.0, 0)
    torch.testing.assert_close(y[0, :, 0], torch.stack(outputs))
    torch.testing.assert_close(after[0, 0], s)


def test_mistakes_name_the_argument():
    x = inputs(4)
    with pytest.raises(ValueError, match="beta_BTH"):
        run()(**{**x, "beta_BTH": x["beta_BTH"][:, :2]})
    with pytest.raises(ValueError, match="keep=9"):
        run(keep=9)(**x)
    with pytest.raises(TypeError, match="segments_BT"):
        run(torch.zeros(2, 4))(**x)
