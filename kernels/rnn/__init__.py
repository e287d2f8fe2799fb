"""Nonlinear recurrent networks over a whole sequence; what the inputs give to the gates is made before, all at once.

Weights of N heads are block-diagonal: (N, G*H, H) for N heads of H units, U = N*H, or (G*U, U) for one.
`segments_BT`: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
Every function returns y (B, T, U) in x's dtype and then each state tensor after, fp32 (fp64 for fp64): (B, U), or with
keep (B, keep+1, U): before the last `keep` columns and after each. It raises ValueError or TypeError naming the
argument.
"""

import torch
from torch import Tensor

from kernels import check, op
from kernels.rnn.cells import CELLS, LINEAR
from kernels.rnn.chunked import chunked, grad
from kernels.rnn.reference import reference


def _fake(
    x_BTGU: Tensor,
    weight: Tensor | None,
    bias_GU: Tensor | None,
    state_BSU: Tensor | None,
    segments_BT: Tensor | None,
    cell: str,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens, _, units = x_BTGU.shape
    moments = (keep + 1,) if keep else ()
    wide, count = torch.promote_types(x_BTGU.dtype, torch.float32), len(CELLS[cell].state)
    state = x_BTGU.new_empty(rows, *moments, count, units, dtype=wide)
    around = (0,) if cell in LINEAR else (tokens + 1, count, rows, units)
    states = x_BTGU.new_empty(around, dtype=wide)
    return x_BTGU.new_empty(rows, tokens, units), state, states


_op = op.Op("rnn", reference, chunked, _fake, grad=grad, saved=1, twice=reference)


def elman(
    x_BTU: Tensor,
    weight_UU: Tensor,
    *,
    activation: str = "tanh",
    hidden_BU: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """h = tanh(x + W h), or relu (Elman 1990). x (B, T, U); weight (U, U) or (N, H, H). State: hidden_BU (B, U)."""
    _activation("elman", activation)
    return _run(
        "elman", activation, {"x_BTU": x_BTU}, {"weight_UU": weight_UU}, {"hidden_BU": hidden_BU}, segments_BT, keep
    )


def indrnn(
    x_BTU: Tensor,
    weight_U: Tensor,
    *,
    activation: str = "relu",
    hidden_BU: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """h = relu(x + w * h), or tanh: each unit reads itself alone (arXiv 1803.04831). x (B, T, U); weight (U)."""
    _activation("indrnn", activation)
    return _run(
        "indrnn", activation, {"x_BTU": x_BTU}, {"weight_U": weight_U}, {"hidden_BU": hidden_BU}, segments_BT, keep
    )


def gru(
    x_BT3U: Tensor,
    weight_3UU: Tensor,
    bias_U: Tensor | None = None,
    *,
    hidden_BU: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """r, z = sigmoid(x + W h); n = tanh(x_n + r (W_n h + bias)); h = (1 - z) n + z h (arXiv 1406.1078, as in torch).

    x (B, T, 3U), gates in the order r, z, n; weight (3U, U) or (N, 3H, H). Every other bias belongs into x.
    """
    return _run(
        "gru",
        "gru",
        {"x_BT3U": x_BT3U},
        {"weight_3UU": weight_3UU},
        {"hidden_BU": hidden_BU},
        segments_BT,
        keep,
        bias_U,
    )


def lstm(
    x_BT4U: Tensor,
    weight_4UU: Tensor,
    *,
    hidden_BU: Tensor | None = None,
    cell_BU: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """i, f, g, o = x + W h; c = sigmoid(f) c + sigmoid(i) tanh(g); h = sigmoid(o) tanh(c) (Hochreiter 1997, Gers 2000).

    x (B, T, 4U), gates in the order i, f, g, o; weight (4U, U) or (N, 4H, H). Returns y, hidden, cell.
    """
    states = {"hidden_BU": hidden_BU, "cell_BU": cell_BU}
    return _run("lstm", "lstm", {"x_BT4U": x_BT4U}, {"weight_4UU": weight_4UU}, states, segments_BT, keep)


def slstm(
    x_BT4U: Tensor,
    weight_4UU: Tensor,
    *,
    hidden_BU: Tensor | None = None,
    cell_BU: Tensor | None = None,
    norm_BU: Tensor | None = None,
    most_BU: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The LSTM with an exponential input gate, held in range by the most any gate has reached (arXiv 2405.04517).

    i, f, z, o = x + W h;  m' = max(log sigmoid(f) + m, i);  F = exp(log sigmoid(f) + m - m'), I = exp(i - m')
    c = F c + I tanh(z);  n = F n + I;  h = sigmoid(o) c / n
    x (B, T, 4U), gates in the order i, f, z, o; weight (4U, U) or (N, 4H, H). A fresh m is -inf. Returns y, hidden,
    cell, norm, most.
    """
    states = {"hidden_BU": hidden_BU, "cell_BU": cell_BU, "norm_BU": norm_BU, "most_BU": most_BU}
    return _run("slstm", "slstm", {"x_BT4U": x_BT4U}, {"weight_4UU": weight_4UU}, states, segments_BT, keep)


def min_gru(
    x_BT2U: Tensor, *, hidden_BU: Tensor | None = None, segments_BT: Tensor | None = None, keep: int = 0
) -> tuple[Tensor, Tensor]:
    """z, c = sigmoid(x_z), g(x_c); h = (1 - z) h + z c, g(x) = x + 1/2 above 0, else sigmoid(x) (arXiv 2410.01201).

    x (B, T, 2U) in the order z, c. On a CPU a scan; on a GPU the whole sequence, or a decode step, is one launch.
    """
    return _run("min_gru", "min_gru", {"x_BT2U": x_BT2U}, {}, {"hidden_BU": hidden_BU}, segments_BT, keep)


def min_lstm(
    x_BT3U: Tensor, *, hidden_BU: Tensor | None = None, segments_BT: Tensor | None = None, keep: int = 0
) -> tuple[Tensor, Tensor]:
    """f, i, c = sigmoid(x_f), sigmoid(x_i), g(x_c); h = (f h + i c) / (f + i) (arXiv 2410.01201).

    x (B, T, 3U) in the order f, i, c; g and forms as of `min_gru`.
    """
    return _run("min_lstm", "min_lstm", {"x_BT3U": x_BT3U}, {}, {"hidden_BU": hidden_BU}, segments_BT, keep)


def _run(name, cell, x, weight, states, segments_BT, keep, bias_U=None):
    """Check, bring everything into the op's layout, call it, and take the states apart."""
    ((x_label, x),) = x.items()
    gates = CELLS[cell].gates
    times = f"{gates}*" if gates > 1 else ""
    check.shape(name, x_label, x, (None, None, None), f"(B, T, {times}U)")
    check.floating(name, x_label, x)
    rows, tokens, width = x.shape
    if width % gates:
        raise ValueError(f"{name}: {x_label} must be (B, T, {times}U), got shape {tuple(x.shape)}")
    units = width // gates
    canonical = None
    for label, value in weight.items():
        canonical = _weight(name, label, value, x, x_label, gates)
    bias_GU = None
    if bias_U is not None:
        check.shape(name, "bias_U", bias_U, (units,), f"(U={units},)")
        check.floating(name, "bias_U", bias_U)
        check.device(name, "bias_U", bias_U, x)
        bias_GU = torch.cat([bias_U.new_zeros(gates - 1, units), bias_U[None]])
    for label, state in states.items():
        if state is not None:
            check.shape(name, label, state, (rows, units), f"(B={rows}, U={units})")
            check.floating(name, label, state)
            check.device(name, label, state, x)
    check.segments(name, segments_BT, rows, tokens)
    if segments_BT is not None:
        check.device(name, "segments_BT", segments_BT, x)
    check.keep(name, keep, tokens)
    carried = None
    if any(state is not None for state in states.values()):
        wide = torch.promote_types(x.dtype, torch.float32)
        carried = torch.stack(
            [
                x.new_full((rows, units), fresh, dtype=wide) if state is None else state.to(wide)
                for state, fresh in zip(states.values(), CELLS[cell].state, strict=True)
            ],
            1,
        )
    y, after = _op(x.unflatten(-1, (gates, units)), canonical, bias_GU, carried, segments_BT, cell, keep)
    return y, *after.unbind(-2)


def _weight(name: str, label: str, weight: Tensor, x: Tensor, x_label: str, gates: int) -> Tensor:
    """The recurrent weight, checked, as the op has it: (N, G, H, H) or (G, U)."""
    units, times = x.shape[2] // gates, f"{gates}*" if gates > 1 else ""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: {label} must be a tensor, got {type(weight).__name__}")
    if name == "indrnn":
        check.shape(name, label, weight, (units,), f"(U={units},), U from {x_label}")
        canonical = weight[None]
    elif weight.dim() == 3:
        heads, _, size = weight.shape
        want = (heads, gates * size, size)
        check.shape(name, label, weight, want, f"(N, {times}H, H) with N*H = U = {units}, U from {x_label}")
        if heads * size != units:
            raise ValueError(f"{name}: {label} has N*H = {heads * size}, {x_label} has U = {units}")
        canonical = weight.view(heads, gates, size, size)
    else:
        want = (gates * units, units)
        check.shape(name, label, weight, want, f"({times}U, U) = {want} or (N, {times}H, H), U from {x_label}")
        canonical = weight.view(1, gates, units, units)
    check.floating(name, label, weight)
    check.device(name, label, weight, x)
    return canonical


def _activation(name: str, value: str) -> None:
    if value not in ("tanh", "relu"):
        raise ValueError(f"{name}: activation={value!r} must be 'tanh' or 'relu'")
