"""elman, indrnn, gru, lstm, slstm: each form against the definition, torch's networks, and states carried."""

import pytest
import torch

import kernels
from tests.kernels.physics import DEVICE, chain, close
from tests.kernels.recurrent import Carried, Recurrent, packed
from tests.kernels.suite import Differentiable, wrong

GATES = {"elman": 1, "indrnn": 1, "gru": 3, "lstm": 4, "slstm": 4, "min_gru": 2, "min_lstm": 3}
STATES = {
    "elman": ["hidden_BU"],
    "indrnn": ["hidden_BU"],
    "gru": ["hidden_BU"],
    "min_gru": ["hidden_BU"],
    "min_lstm": ["hidden_BU"],
    "lstm": ["hidden_BU", "cell_BU"],
    "slstm": ["hidden_BU", "cell_BU", "norm_BU", "most_BU"],
}


def draw(name, rows, tokens, units, heads=1, state=True):
    gates, size = GATES[name], units // heads
    inputs = {"x": torch.randn(rows, tokens, gates * units)}
    if name == "indrnn":
        inputs["weight"] = torch.rand(units) * 1.6 - 0.8
    elif name.startswith("min_"):
        inputs["weight"] = None
    elif heads == 1:
        inputs["weight"] = torch.randn(gates * size, size) * size**-0.5
    else:
        inputs["weight"] = torch.randn(heads, gates * size, size) * size**-0.5
    if name == "gru":
        inputs["bias"] = torch.randn(units)
    for label in STATES[name] if state else ():
        inputs[label] = torch.randn(rows, units)
    if state and name == "slstm":
        inputs["norm_BU"] = inputs["norm_BU"].abs() + 1  # as after a step: n is at least 1 where m was reached
    return inputs


def bound(name, keep=0, **options):
    def call(x, weight, bias=None, segments=None, **states):
        extra = {} if bias is None else {"bias_U": bias}
        weights = () if weight is None else (weight,)
        return getattr(kernels, name)(x, *weights, **extra, **states, segments_BT=segments, keep=keep, **options)

    return call


def case(name, rows, tokens, units, heads=1, keep=0, state=True, pack=False, **options):
    def make():
        inputs = draw(name, rows, tokens, units, heads, state)
        if pack:
            inputs["segments"] = packed(rows, tokens)
        return bound(name, keep, **options), inputs

    return make


class TestRNN(Differentiable):
    CASES = {
        "elman": case("elman", 3, 23, 20),
        "indrnn": case("indrnn", 3, 63, 60, keep=2),
        "indrnn-tanh": case("indrnn", 2, 23, 20, activation="tanh", pack=True),
        "gru": case("gru", 3, 23, 20, keep=3),
        "gru-heads": case("gru", 2, 23, 36, heads=2, pack=True, keep=2),
        "lstm": case("lstm", 3, 23, 20, state=False),
        "lstm-packed": case("lstm", 3, 40, 20, pack=True, keep=2),
        "slstm": case("slstm", 2, 23, 36, heads=2, state=False),
        "slstm-packed": case("slstm", 3, 40, 20, pack=True, keep=3),
        "min_gru": case("min_gru", 2, 63, 60, keep=2),
        "min_gru-packed": case("min_gru", 3, 40, 20, pack=True, state=False),
        "min_lstm": case("min_lstm", 3, 40, 20, pack=True, keep=3),
        "empty": case("lstm", 2, 0, 20),
        "one": case("gru", 2, 1, 20, keep=1),
    }
    SMALL = {
        name: case(name, 2, 6, 4, heads=2 if name in ("elman", "gru", "lstm", "slstm") else 1, keep=1, pack=True)
        for name in GATES
    }


class TestKink(Differentiable):
    """In bf16 a rounded hidden unit can fall on the other side of relu's kink than the exact one: fp32 alone."""

    DTYPES = (torch.float32,)
    CASES = {"elman-relu": case("elman", 2, 23, 36, heads=2, activation="relu")}
    SMALL = {"elman-relu": case("elman", 2, 5, 4, activation="relu")}


recurrents = {
    name: Recurrent(
        lambda segments=None, keep=0, name=name: lambda **x: bound(name, keep)(**x, segments=segments),
        lambda tokens, rows=2, name=name: draw(name, rows, tokens, 6),
        STATES[name],
        ["weight", "bias"],
    )
    for name in GATES
}  # fmt: skip


class TestCarried(Carried):
    RECURRENTS = recurrents


@pytest.mark.parametrize("name", ["elman", "gru", "lstm"])
@pytest.mark.parametrize("tokens, rows, dim, units", [(1, 1, 3, 4), (17, 3, 5, 7), (60, 2, 8, 16)])
def test_is_torch(name, tokens, rows, dim, units):
    make = {"elman": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[name]
    theirs = make(dim, units, batch_first=True).double().to(DEVICE)
    x_BTD, *carried = (
        torch.randn(shape, dtype=torch.float64, device=DEVICE).requires_grad_()
        for shape in ((rows, tokens, dim), *[(1, rows, units)] * len(STATES[name]))
    )
    bias, recurrent_bias = theirs.bias_ih_l0, theirs.bias_hh_l0
    expected, after = theirs(x_BTD, tuple(carried) if name == "lstm" else carried[0])
    inner = {}
    if name == "gru":
        inner["bias"] = recurrent_bias[-units:]
        recurrent_bias = torch.cat([recurrent_bias[:-units], torch.zeros_like(inner["bias"])])
    x = x_BTD @ theirs.weight_ih_l0.T + bias + recurrent_bias
    states = {label: value[0] for label, value in zip(STATES[name], carried, strict=True)}
    ours = bound(name)(x, theirs.weight_hh_l0, **inner, **states)
    expected = [expected, *(s[0] for s in (after if name == "lstm" else (after,)))]
    leaves = [x_BTD, *carried, *theirs.parameters()]
    weights = [torch.randn_like(y) for y in expected]
    found, wanted = (
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), leaves)
        for outputs in (ours, expected)
    )
    for one, two in zip([*ours, *found], [*expected, *wanted], strict=True):
        close(one, two, 1e-12)


def test_indrnn_is_a_loop_of_units_alone():
    x, weight = torch.randn(2, 9, 5).double(), torch.randn(5).double()
    y, _ = kernels.indrnn(x, weight)
    for unit in range(5):
        h = torch.zeros(2).double()
        for t in range(9):
            h = (x[:, t, unit] + weight[unit] * h).clamp(min=0)
            close(y[:, t, unit], h, 1e-12)


def test_heads_are_networks_of_their_own():
    inputs = draw("slstm", 2, 11, 12, heads=3, state=False)
    y, *_ = kernels.slstm(inputs["x"], inputs["weight"])
    x = inputs["x"].unflatten(-1, (4, 3, 4))
    for head in range(3):
        close(kernels.slstm(x[:, :, :, head].flatten(2), inputs["weight"][head])[0], y[..., 4 * head : 4 * head + 4])


@pytest.mark.parametrize("name", ["min_gru", "min_lstm"])
def test_minimal_cells_are_their_logarithms(name):
    """The scan of the paper, in logarithms: log h = a + logcumsumexp(log b - a), with a the sum of log decays."""
    x, hidden = draw(name, 2, 40, 5)["x"].double(), torch.rand(2, 5).double() + 0.1
    *gates, c = x.chunk(GATES[name], -1)
    log_g = torch.where(c >= 0, (c.clamp(min=0) + 0.5).log(), -torch.nn.functional.softplus(-c))
    softplus = torch.nn.functional.softplus
    if name == "min_gru":
        log_decay, log_given = -softplus(gates[0]), -softplus(-gates[0])
    else:
        difference = softplus(-gates[0]) - softplus(-gates[1])
        log_decay, log_given = -softplus(difference), -softplus(-difference)
    a = torch.cat([torch.zeros_like(hidden)[:, None], log_decay.cumsum(1)], 1)
    log_b = torch.cat([hidden.log()[:, None], log_given + log_g], 1)
    close(bound(name)(x, None, hidden_BU=hidden)[0], (a + torch.logcumsumexp(log_b - a, 1))[:, 1:].exp(), 1e-12)


def test_slstm_is_its_unstabilised_form():
    """Without the running maximum the same numbers come out wherever they fit in a float64, and only there."""
    inputs = {n: x.double() for n, x in draw("slstm", 2, 11, 4, state=False).items()}
    y, *_ = kernels.slstm(**{"x_BT4U": inputs["x"], "weight_4UU": inputs["weight"]})
    h = c = n = torch.zeros(2, 4).double()
    for t in range(11):
        i, f, z, o = (inputs["x"][:, t] + h @ inputs["weight"].T).chunk(4, 1)
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        close(y[:, t], h, 1e-12)
    inputs["x"][:, 3, :4] = 900.0  # exp overflows a float64
    assert kernels.slstm(inputs["x"], inputs["weight"])[0].isfinite().all()


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_triton_with_weights_over_many_programs(name, monkeypatch):
    """Hidden units of one head spread over programs that meet after every token, and weights that are streamed."""
    from kernels.rnn import triton

    for on_chip in (2**12, 2**11):
        monkeypatch.setattr(triton, "ON_CHIP", on_chip)
        call, inputs = case(name, 3, 7, 40, pack=False, keep=2)()
        chain(call, inputs, "triton")


def test_mistakes_name_the_argument():
    inputs = {"x_BT4U": torch.randn(2, 4, 12), "weight_4UU": torch.randn(12, 3)}
    wrong(kernels.lstm, inputs, ValueError, "weight_4UU", weight_4UU=torch.randn(5, 3))
    wrong(kernels.lstm, inputs, ValueError, "weight_4UU", weight_4UU=torch.randn(3, 4, 2))
    wrong(kernels.lstm, inputs, ValueError, "weight_4UU", weight_4UU=torch.randn(12, 3, device="meta"))
    wrong(kernels.lstm, inputs, ValueError, "x_BT4U", x_BT4U=torch.randn(2, 4, 11))
    wrong(kernels.lstm, inputs, TypeError, "x_BT4U", x_BT4U=torch.ones(2, 4, 12, dtype=torch.int64))
    wrong(kernels.lstm, inputs, ValueError, "cell_BU", cell_BU=torch.randn(2, 2))
    wrong(kernels.lstm, inputs, ValueError, "keep=9", keep=9)
    wrong(kernels.lstm, inputs, TypeError, "segments_BT", segments_BT=torch.zeros(2, 4))
    wrong(
        kernels.elman,
        {"x_BTU": torch.randn(1, 2, 3), "weight_UU": torch.eye(3)},
        ValueError,
        "activation",
        activation="sin",
    )
    wrong(
        kernels.indrnn,
        {"x_BTU": torch.randn(1, 2, 3), "weight_U": torch.ones(3)},
        ValueError,
        "weight_U",
        weight_U=torch.eye(3),
    )
    wrong(
        kernels.gru,
        {"x_BT3U": torch.randn(1, 2, 9), "weight_3UU": torch.randn(9, 3)},
        ValueError,
        "bias_U",
        bias_U=torch.ones(9),
    )
