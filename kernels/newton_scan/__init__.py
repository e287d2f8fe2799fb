"""Nonlinear recurrences in parallel by Newton's method: the GRU and LSTM of ParaRNN."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.newton_scan.cells import CELLS
from kernels.newton_scan.chunked import chunked, grad
from kernels.newton_scan.reference import reference


def _fake(
    x_BT3D: Tensor,
    weight_ND: Tensor,
    state_BKD: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
    cell: str,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens, _, size = x_BT3D.shape
    states = CELLS[cell].states
    moments = (keep + 1,) if keep else ()
    wide = torch.promote_types(x_BT3D.dtype, torch.float32)
    state = x_BT3D.new_empty(rows, *moments, states, size, dtype=wide)
    return x_BT3D.new_empty(rows, tokens, size), state, state.new_empty(states, rows, tokens + 1, size)


_op = op.Op("newton_scan", reference, chunked, _fake, grad=grad, saved=1, twice=reference)


def para_gru(
    x_BT3D: Tensor,
    weight_3D: Tensor,
    *,
    state_BD: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
    iterations: int | None = None,
) -> tuple[Tensor, Tensor]:
    """z = sigmoid(a_z h + x_z), r = sigmoid(a_r h + x_r), c = tanh(a_c r h + x_c);  h' = (1 - z) h + z c.

    ParaRNN (arXiv 2510.21450). x (B, T, 3, D): what inputs and biases give to z, r, c; weight (3, D): a_z, a_r, a_c.
    state_BD: (B, D), h before the first token; None is zeros.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    iterations: None goes on until the recurrence holds to rounding, a number stops after so many rounds of Newton's
    method (the paper takes 3): quicker, and then an approximation. The definition has no rounds.
    Returns h (B, T, D) in x's dtype, and the state after, fp32 (fp64 for fp64): (B, D), or with keep (B, keep+1, D):
    before the last `keep` columns and after each. Raises ValueError or TypeError naming the argument.
    """
    _check("para_gru", x_BT3D, {"weight_3D": (weight_3D, 3)}, {"state_BD": state_BD}, segments_BT, keep, iterations)
    state = None if state_BD is None else state_BD[:, None]
    y, state = _op(x_BT3D, weight_3D, state, segments_BT, keep, "gru", iterations or 0)
    return y, state[..., 0, :]


def para_lstm(
    x_BT3D: Tensor,
    weight_5D: Tensor,
    *,
    hidden_BD: Tensor | None = None,
    cell_BD: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
    iterations: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """f = sigmoid(a_f h + p_f c + x_f);  c' = f c + (1 - f) tanh(a_c h + x_c);

    o = sigmoid(a_o h + p_o c' + x_o);  h' = o tanh(c'). ParaRNN (arXiv 2510.21450).
    x (B, T, 3, D): for f, c, o; weight (5, D): a_f, a_c, a_o, p_f, p_o; hidden_BD, cell_BD (B, D) or None; the rest
    as in `para_gru`. Returns h, and hidden and cell after.
    """
    states = {"hidden_BD": hidden_BD, "cell_BD": cell_BD}
    _check("para_lstm", x_BT3D, {"weight_5D": (weight_5D, 5)}, states, segments_BT, keep, iterations)
    state = None
    if hidden_BD is not None or cell_BD is not None:
        zeros = torch.zeros_like(cell_BD if hidden_BD is None else hidden_BD)
        state = torch.stack([zeros if cell_BD is None else cell_BD, zeros if hidden_BD is None else hidden_BD], 1)
    y, state = _op(x_BT3D, weight_5D, state, segments_BT, keep, "lstm", iterations or 0)
    return y, state[..., 1, :], state[..., 0, :]


def _check(op_name, x_BT3D, weight, states, segments_BT, keep, iterations) -> None:
    check.shape(op_name, "x_BT3D", x_BT3D, (None, None, 3, None), "(B, T, 3, D)")
    check.floating(op_name, "x_BT3D", x_BT3D)
    rows, tokens, _, size = x_BT3D.shape
    for name, (value, count) in weight.items():
        check.shape(op_name, name, value, (count, size), f"({count}, D={size}), D from x_BT3D")
        check.floating(op_name, name, value)
        check.device(op_name, name, value, x_BT3D)
    for name, value in states.items():
        if value is not None:
            check.shape(op_name, name, value, (rows, size), f"(B={rows}, D={size})")
            check.floating(op_name, name, value)
            check.device(op_name, name, value, x_BT3D)
    check.segments(op_name, segments_BT, rows, tokens)
    check.keep(op_name, keep, tokens)
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1):
        raise ValueError(f"{op_name}: iterations={iterations!r} must be None or a whole number of at least 1")
