"""conv1d: each form against the definition, and torch; the carried tail, documents and padding."""

import pytest
import torch
from torch.nn.functional import conv1d as torch_conv1d
from torch.nn.functional import pad, silu

from kernels import conv1d
from tests.kernels.physics import chain, close
from tests.kernels.recurrent import packed
from tests.kernels.suite import Differentiable, wrong


def inputs(tokens=63, rows=2, dim=60, taps=4, dtype=torch.float32, state=True, bias=True):
    return {
        "x_BTD": torch.randn(rows, tokens, dim, dtype=dtype),
        "weight_DW": torch.randn(dim, taps, dtype=dtype),
        "bias_D": torch.randn(dim, dtype=dtype) if bias else None,
        "state_BWD": torch.randn(rows, taps - 1, dim, dtype=dtype) if state else None,
    }


def run(segments=None, keep=0, activation="silu"):
    return lambda segments_BT=segments, **x: conv1d(**x, segments_BT=segments_BT, keep=keep, activation=activation)


def case(tokens=63, segments=None, keep=0, activation="silu", **options):
    def draw():
        x = inputs(tokens, **options)
        if segments is not None:
            x["segments_BT"] = packed(2, tokens) if segments == "packed" else torch.tensor(segments)
        return run(keep=keep, activation=activation), x

    return draw


class TestConv1d(Differentiable):
    CASES = {
        "silu": case(keep=3),
        "plain": case(70, activation=None, bias=False, state=False, dim=20),
        "one-tap": case(5, taps=1, keep=1),
        "many-taps": case(9, taps=7, keep=9, dim=5),
        "packed": case(80, "packed", keep=5, dim=20),
        "packed-plain": case(63, "packed", activation=None, state=False, dim=20),
        "short": case(3, [[0, -1, 0], [-1, 1, 2]], keep=2, dim=20),
        "padding": case(3, [[0, -1, 0], [-1, -1, -1]], keep=3, taps=3, dim=20),
        "no-padding": case(6, [[0, 0, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1]], keep=2, dim=20),
        "none": case(0),
        "one": case(1, keep=1),
        "two": case(2, keep=2),
    }
    SMALL = {
        "silu": case(4, keep=2, dim=2, taps=3),
        "packed": case(6, [[0, 0, -1, 1, 1, 2], [-1, 1, 1, 1, 1, 2]], keep=2, dim=2, taps=3),
        "plain": case(3, activation=None, bias=False, state=False, dim=2),
    }


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


def test_blocks_of_time():
    """Gradients across the edges between blocks, with documents over them."""
    call, x = case(200, "packed", keep=2, dim=2048, taps=3)()
    chain(call, x)


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


def test_mistakes_name_the_argument():
    x = inputs(4)
    wrong(run(), x, ValueError, "weight_DW", weight_DW=x["weight_DW"][:3])
    wrong(run(activation="relu"), x, ValueError, "activation='relu'")
    wrong(run(), x, ValueError, "state_BWD", state_BWD=x["state_BWD"][:, :1])
    wrong(run(), x, TypeError, "bias_D must be floating", bias_D=torch.zeros(60, dtype=torch.int64))
    wrong(run(), x, ValueError, "weight_DW must be on", weight_DW=x["weight_DW"].to("meta"))
