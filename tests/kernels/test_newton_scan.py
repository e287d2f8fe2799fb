"""para_gru and para_lstm: each form against the sequential definition, and Newton's method itself."""

import pytest
import torch

from kernels import para_gru, para_lstm
from kernels.newton_scan.cells import CELLS
from tests.kernels.physics import DEVICE, close, using
from tests.kernels.recurrent import Carried, Recurrent, packed
from tests.kernels.suite import Differentiable, wrong


def gru_inputs(tokens=63, rows=2, size=60, state=True, scale=0.5):
    return {
        "x_BT3D": torch.randn(rows, tokens, 3, size),
        "weight_3D": torch.randn(3, size) * scale,
        "state_BD": torch.randn(rows, size) if state else None,
    }


def lstm_inputs(tokens=63, rows=2, size=60, state=True, scale=0.5):
    return {
        "x_BT3D": torch.randn(rows, tokens, 3, size),
        "weight_5D": torch.randn(5, size) * scale,
        "hidden_BD": torch.randn(rows, size) if state else None,
        "cell_BD": torch.randn(rows, size) if state else None,
    }


SHORT = torch.tensor([[0, -1, 0, 1, 1, 1, -1, 1, 2, -1], [-1, 1, 2, 2, 2, 2, 2, 3, 3, 3]])
DRAWS = {para_gru: gru_inputs, para_lstm: lstm_inputs}


def run(cell, segments=None, keep=0):
    return lambda segments_BT=segments, **x: cell(**x, segments_BT=segments_BT, keep=keep)


def case(cell, tokens=63, segments=False, keep=0, **options):
    def draw():
        x = DRAWS[cell](tokens, **options)
        if segments:
            x["segments_BT"] = packed(2, tokens) if tokens > 10 else SHORT
        return run(cell, keep=keep), x

    return draw


class TestNewtonScan(Differentiable):
    CASES = {
        "gru": case(para_gru, keep=3),
        "gru-packed": case(para_gru, 80, segments=True, keep=5, size=20, state=False),
        "lstm": case(para_lstm, keep=3, size=30),
        "lstm-packed": case(para_lstm, 70, segments=True, keep=5, size=20),
        "none": case(para_gru, 0, size=3),
        "one": case(para_lstm, 1, keep=1, size=3),
    }
    SMALL = {
        "gru": case(para_gru, 10, segments=True, keep=4, size=2),
        "lstm": case(para_lstm, 10, segments=True, keep=1, size=1),
        "lstm-bare": case(para_lstm, 3, size=2, state=False),
    }


RECURRENT = {
    "gru": Recurrent(
        lambda segments=None, keep=0: run(para_gru, segments, keep),
        lambda tokens, rows=2: gru_inputs(tokens, rows, 20),
        states=["state_BD"],
        fixed=["weight_3D"],
    ),
    "lstm": Recurrent(
        lambda segments=None, keep=0: run(para_lstm, segments, keep),
        lambda tokens, rows=2: lstm_inputs(tokens, rows, 20),
        states=["hidden_BD", "cell_BD"],
        fixed=["weight_5D"],
    ),
}


class TestCarried(Carried):
    RECURRENTS = RECURRENT


@pytest.mark.parametrize("cell", list(DRAWS))
def test_wild_weights_converge_all_the_same(cell, form):
    """Slopes far above 1: from most guesses the first rounds go anywhere, and rounding grows from token to token."""
    x = {n: v.to(DEVICE) for n, v in DRAWS[cell](100, size=20, scale=2.0).items()}
    with using("reference"):
        want = cell(**x)
    with using(form):
        for ours, theirs in zip(cell(**x), want, strict=True):
            close(ours, theirs, 1e-4)


@pytest.mark.parametrize("cell", list(DRAWS))
def test_rounds(cell, form):
    """As many rounds as tokens are exact; three are near, as the paper says; without feedback one is exact."""
    x = {n: v.to(DEVICE) for n, v in DRAWS[cell](40, size=20, scale=0.2).items()}
    with using("reference"):
        want = cell(**x)[0]
    with using(form):
        close(cell(**x, iterations=40)[0], want)
        assert 1e-6 < (cell(**x, iterations=1)[0] - want).abs().max()
        assert (cell(**x, iterations=3)[0] - want).abs().max() < 1e-2


@pytest.mark.parametrize("name", list(CELLS))
def test_slopes_are_autograds(name):
    cell = CELLS[name]
    x, w, s = (torch.randn(n, 4, dtype=torch.float64) for n in (3, cell.weights, cell.states))
    value, jacobian, by_x = cell.slopes(x, w, s)
    close(value, cell.step(x, w, s))
    of_s, of_x, of_w = (
        torch.func.jacrev(cell.step, i)(x, w, s).diagonal(dim1=1, dim2=3) for i in (2, 0, 1)
    )  # (states, n, 4)
    close(jacobian, of_s)
    close(by_x.transpose(0, 1), of_x)
    for i, (factor, place) in enumerate(cell.weight_slopes(x, w, s, by_x)):
        close(by_x[place] * factor, of_w[:, i])


def test_gru_is_torch_grucell_with_diagonal_weights():
    """torch's cell applies r after the product with the weight, which for a diagonal weight is the same."""
    x = gru_inputs(30, size=5)
    torch_gru = torch.nn.GRU(15, 5, batch_first=True)
    eye, zero = torch.eye(5), torch.zeros(15)
    a_z, a_r, a_c = x["weight_3D"]
    with torch.no_grad():
        # torch: r, z, n and h' = (1 - z) n + z h, so its z is ours of the other sign.
        torch_gru.weight_hh_l0.copy_(torch.cat([eye * a_r, -eye * a_z, eye * a_c]))
        torch_gru.weight_ih_l0.copy_(torch.eye(15))
        torch_gru.bias_ih_l0.copy_(zero)
        torch_gru.bias_hh_l0.copy_(zero)
        z, r, c = x["x_BT3D"].unbind(2)
        want, _ = torch_gru(torch.cat([r, -z, c], 2), x["state_BD"][None])
    close(run(para_gru)(**x)[0], want)


def test_mistakes_name_the_argument():
    x = gru_inputs(4)
    wrong(run(para_gru), x, ValueError, "weight_3D", weight_3D=torch.zeros(5, 60))
    wrong(run(para_gru), x, ValueError, "state_BD", state_BD=torch.zeros(2, 3))
    wrong(run(para_gru), x, ValueError, "state_BD must be on", state_BD=torch.zeros(2, 60, device="meta"))
    wrong(run(para_gru), x, ValueError, "x_BT3D", x_BT3D=torch.zeros(2, 4, 60))
    wrong(run(para_gru), x, ValueError, "iterations=0", iterations=0)
    wrong(run(para_lstm), lstm_inputs(4), TypeError, "cell_BD", cell_BD=torch.zeros(2, 60, dtype=torch.int64))
    wrong(run(para_lstm, keep=5), lstm_inputs(4), ValueError, "keep=5")
