"""lstm: against its form and torch.nn.LSTM, the carried state, documents and padding."""

import pytest
import torch

from kernels import lstm
from tests.kernels.physics import chain, close, using
from tests.kernels.recurrent import Recurrent, packed


def inputs(tokens=23, rows=2, size=6, dtype=torch.float32, state=True):
    wide = torch.promote_types(dtype, torch.float32)
    made = {
        "x_BT4H": torch.randn(rows, tokens, 4 * size).to(dtype),
        "weight_4HH": (torch.randn(4 * size, size) * size**-0.5).to(dtype),
    }
    for name in ("hidden_BH", "cell_BH"):
        made[name] = torch.randn(rows, size, dtype=wide) if state else None
    return made


def run(segments=None, keep=0):
    return lambda **x: lstm(
        x["x_BT4H"],
        x["weight_4HH"],
        hidden_BH=x["hidden_BH"],
        cell_BH=x["cell_BH"],
        segments_BT=segments,
        keep=keep,
    )


recurrent = Recurrent(run, inputs, ["hidden_BH", "cell_BH"], ["weight_4HH"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, keep", [(0, 0), (1, 0), (1, 1), (5, 2), (23, 0), (23, 23)])
@pytest.mark.parametrize("state", [True, False])
def test_chain(tokens, keep, state, dtype):
    chain(run(keep=keep), inputs(tokens, dtype=dtype, state=state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, keep", [(3, 0), (3, 3), (40, 2)])
@pytest.mark.parametrize("state", [True, False])
def test_chain_packed(tokens, keep, state, dtype):
    segments = packed(3, tokens) if tokens > 8 else torch.tensor([[0, -1, 0], [-1, 1, 2], [-1, -1, -1]])
    chain(run(segments, keep), inputs(tokens, rows=3, state=state, dtype=dtype))


def test_documents_and_padding_are_as_if_alone():
    recurrent.documents_and_padding_are_as_if_alone()


def test_padding_alone_changes_no_bit():
    recurrent.padding_alone_changes_no_bit()


@pytest.mark.parametrize("cut", [1, 37, 99])
def test_split_is_one_pass(cut):
    recurrent.split_is_one_pass(cut)


def test_keep_is_the_state_of_shorter_calls():
    recurrent.keep_is_the_state_of_shorter_calls()


def test_earlier_outputs_do_not_change_by_a_bit():
    recurrent.earlier_outputs_do_not_change_by_a_bit()


def test_rows_are_independent():
    recurrent.rows_are_independent()


def test_gradcheck():
    x = {n: v.double().requires_grad_() for n, v in inputs(6, rows=1, size=2).items()}
    segments = torch.tensor([[0, 0, -1, 1, 1, 2]])

    def call(keep):
        return lambda *v: run(segments, keep)(**dict(zip(x, v, strict=True)))

    with using("reference"):
        assert torch.autograd.gradcheck(call(0), tuple(x.values()))
    assert torch.autograd.gradcheck(call(1), tuple(x.values()))
    assert torch.autograd.gradgradcheck(call(0), tuple(x.values()))


@pytest.mark.parametrize("tokens, rows, dim, size", [(1, 1, 3, 4), (17, 3, 5, 7), (60, 2, 8, 16)])
def test_is_torch_lstm(tokens, rows, dim, size):
    theirs = torch.nn.LSTM(dim, size, batch_first=True).double()
    x_BTD = torch.randn(rows, tokens, dim).double().requires_grad_()
    h, c = (torch.randn(1, rows, size).double().requires_grad_() for _ in range(2))
    expected, (hidden, cell) = theirs(x_BTD, (h, c))
    gates = x_BTD @ theirs.weight_ih_l0.T + theirs.bias_ih_l0 + theirs.bias_hh_l0
    ours = lstm(gates, theirs.weight_hh_l0, hidden_BH=h[0], cell_BH=c[0])
    expected, leaves = (expected, hidden[0], cell[0]), [x_BTD, h, c, *theirs.parameters()]
    weights = [torch.randn_like(y) for y in expected]
    for one, two in zip(ours, expected, strict=True):
        close(one, two, 1e-12)
    found, wanted = (
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), leaves)
        for outputs in (ours, expected)
    )
    for one, two in zip(found, wanted, strict=True):
        close(one, two, 1e-12)


def test_opcheck_and_compile():
    x, segments = inputs(9), packed(2, 9)
    torch.library.opcheck(torch.ops.edifice.lstm.default, (*x.values(), segments, 2))
    torch.compiler.reset()
    compiled = torch.compile(run(segments, 2), backend="eager", fullgraph=True)
    for ours, eager in zip(compiled(**x), run(segments, 2)(**x), strict=True):
        assert torch.equal(ours, eager)


def test_mistakes_name_the_argument():
    x = inputs(4)
    with pytest.raises(ValueError, match="weight_4HH"):
        run()(**{**x, "weight_4HH": x["weight_4HH"][:5]})
    with pytest.raises(ValueError, match="x_BT4H"):
        run()(**{**x, "x_BT4H": x["x_BT4H"][..., :5]})
    with pytest.raises(ValueError, match="cell_BH"):
        run()(**{**x, "cell_BH": x["cell_BH"][:, :2]})
    with pytest.raises(ValueError, match="keep=9"):
        run(keep=9)(**x)
    with pytest.raises(TypeError, match="segments_BT"):
        run(torch.zeros(2, 4))(**x)
