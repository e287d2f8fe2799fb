"""conv1d: chunked against its form and torch, the carried tail, documents and padding."""

import pytest
import torch
from torch.nn.functional import conv1d as torch_conv1d
from torch.nn.functional import pad, silu

from kernels import conv1d
from tests.kernels.physics import chain, close, using
from tests.kernels.test_gated_delta import packed


def inputs(tokens=63, rows=2, dim=60, taps=4, dtype=torch.float32, state=True, bias=True):
    return {
        "x_BTD": torch.randn(rows, tokens, dim, dtype=dtype),
        "weight_DW": torch.randn(dim, taps, dtype=dtype),
        "bias_D": torch.randn(dim, dtype=dtype) if bias else None,
        "state_BWD": torch.randn(rows, taps - 1, dim, dtype=dtype) if state else None,
    }


def run(segments=None, keep=0, activation="silu"):
    return lambda **x: conv1d(**x, segments_BT=segments, keep=keep, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, keep", [(0, 0), (1, 0), (1, 1), (2, 2), (63, 3)])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("taps", [1, 4])
def test_chain(tokens, keep, state, taps, dtype):
    chain(run(keep=keep), inputs(tokens, taps=taps, dtype=dtype, state=state))


@pytest.mark.parametrize("tokens, keep", [(3, 2), (63, 2), (80, 0)])
@pytest.mark.parametrize("state, taps", [(True, 4), (False, 4), (True, 1)])
def test_chain_packed(tokens, keep, state, taps):
    segments = packed(3, tokens) if tokens > 8 else torch.tensor([[0, -1, 0], [-1, 1, 2], [-1, -1, -1]])
    chain(run(segments, keep, None), inputs(tokens, rows=3, taps=taps, state=state, bias=False))


def test_chain_packed_without_padding():
    chain(run(torch.tensor([[0, 0, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1]]), 2), inputs(6))


def test_is_torch_conv1d():
    x = inputs(63, state=False)
    y, _ = run()(**x)
    line = pad(x["x_BTD"].transpose(1, 2), (3, 0))
    close(y, silu(torch_conv1d(line, x["weight_DW"][:, None], x["bias_D"], groups=60)).transpose(1, 2))


def test_documents_and_padding_are_as_if_alone():
    x, segments = inputs(40, rows=1), torch.full((1, 40), -1)
    segments[0, 3:12], segments[0, 14:16], segments[0, 20:38] = 0, 1, 2
    segments[0, [6, 25, 26]] = -1
    y, state = run(segments)(**x)
    for number in range(3):
        at = segments[0] == number
        alone = {**x, "x_BTD": x["x_BTD"][:, at], "state_BWD": x["state_BWD"] if number == 0 else None}
        y_alone, state_alone = run()(**alone)
        close(y[:, at], y_alone)
    assert torch.equal(state, state_alone)


@pytest.mark.parametrize("cut", [1, 2, 17])
def test_split_anywhere_is_one_pass(cut):
    x = inputs(18)
    state = x["state_BWD"].requires_grad_()
    y, after = run()(**x)
    y1, middle = run()(**{**x, "x_BTD": x["x_BTD"][:, :cut]})
    y2, after2 = run()(**{**x, "x_BTD": x["x_BTD"][:, cut:], "state_BWD": middle})
    close(torch.cat([y1, y2], 1), y)
    assert torch.equal(after2, after)
    close(*(torch.autograd.grad(z.square().sum(), state)[0] for z in (torch.cat([y1, y2], 1), y)))


def test_keep_is_the_state_of_shorter_calls():
    x, segments = inputs(30), packed(2, 30)
    _, kept = run(segments, keep=6)(**x)
    for j in range(7):
        short = {**x, "x_BTD": x["x_BTD"][:, : 24 + j]}
        assert torch.equal(kept[:, j], run(segments[:, : 24 + j])(**short)[1])


def test_earlier_outputs_do_not_change_by_a_bit():
    x = inputs(30)
    other = {**x, "x_BTD": torch.cat([x["x_BTD"][:, :11], x["x_BTD"][:, 11:] * 0.5], 1)}
    assert torch.equal(run()(**other)[0][:, :11], run()(**x)[0][:, :11])


def test_rows_are_independent():
    x, segments = inputs(30, rows=3), packed(3, 30)
    one = {**x, "x_BTD": x["x_BTD"][1:2], "state_BWD": x["state_BWD"][1:2]}
    for all_rows, alone in zip(run(segments)(**x), run(segments[1:2])(**one), strict=True):
        close(all_rows[1:2], alone)


def test_gradcheck():
    x = {n: v.double().requires_grad_() for n, v in inputs(6, dim=2, taps=3).items()}
    segments = torch.tensor([[0, 0, -1, 1, 1, 2], [-1, 1, 1, 1, 1, 2]])

    def call(*v):
        return run(segments, 2)(**dict(zip(x, v, strict=True)))

    with using("reference"):
        assert torch.autograd.gradcheck(call, tuple(x.values()))
    assert torch.autograd.gradcheck(call, tuple(x.values()))
    assert torch.autograd.gradgradcheck(call, tuple(x.values()))


def test_mistakes_name_the_argument():
    x = inputs(4)
    with pytest.raises(ValueError, match="weight_DW"):
        run()(**{**x, "weight_DW": x["weight_DW"][:3]})
    with pytest.raises(ValueError, match="activation='relu'"):
        run(activation="relu")(**x)
    with pytest.raises(ValueError, match="state_BWD"):
        run()(**{**x, "state_BWD": x["state_BWD"][:, :1]})
