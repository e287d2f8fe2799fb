"""The recurrent half of an LSTM over a whole sequence; the products with the inputs are made before, all at once."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.lstm.chunked import chunked, grad
from kernels.lstm.reference import reference


def _fake(
    x_BT4H: Tensor,
    weight_4HH: Tensor,
    hidden_BH: Tensor | None,
    cell_BH: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, tokens, size = x_BT4H.shape[0], x_BT4H.shape[1], weight_4HH.shape[1]
    moments = (keep + 1,) if keep else ()
    wide = torch.promote_types(x_BT4H.dtype, torch.float32)
    hidden, cell = (x_BT4H.new_empty(rows, *moments, size, dtype=wide) for _ in range(2))
    gates = x_BT4H.new_empty(tokens, rows, 4 * size, dtype=wide)
    hiddens, cells = (x_BT4H.new_empty(tokens + 1, rows, size, dtype=wide) for _ in range(2))
    return x_BT4H.new_empty(rows, tokens, size), hidden, cell, gates, hiddens, cells


_op = op.Op("lstm", reference, chunked, _fake, grad=grad, saved=3, twice=reference)


def lstm(
    x_BT4H: Tensor,
    weight_4HH: Tensor,
    *,
    hidden_BH: Tensor | None = None,
    cell_BH: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each token i, f, g, o = x + W h; c = sigmoid(f) c + sigmoid(i) tanh(g); h = sigmoid(o) tanh(c).

    x (B, T, 4H): what the inputs and biases give to the gates, in the order i, f, g, o; weight (4H, H).
    hidden_BH, cell_BH: (B, H) carried in; None is zeros.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    Returns y (B, T, H) in x's dtype, and hidden and cell after, fp32 (fp64 for fp64): (B, H), or with keep
    (B, keep+1, H): before the last `keep` columns and after each.
    Raises ValueError or TypeError naming the argument.
    """
    check.shape("lstm", "weight_4HH", weight_4HH, (None, None), "(4H, H)")
    size = weight_4HH.shape[1]
    check.shape("lstm", "weight_4HH", weight_4HH, (4 * size, size), f"(4H, H) = ({4 * size}, {size})")
    check.shape("lstm", "x_BT4H", x_BT4H, (None, None, 4 * size), f"(B, T, 4H={4 * size}), H from weight_4HH")
    check.floating("lstm", "x_BT4H", x_BT4H)
    check.floating("lstm", "weight_4HH", weight_4HH)
    rows, tokens, _ = x_BT4H.shape
    for label, state in (("hidden_BH", hidden_BH), ("cell_BH", cell_BH)):
        if state is not None:
            check.shape("lstm", label, state, (rows, size), f"(B={rows}, H={size})")
    check.segments("lstm", segments_BT, rows, tokens)
    check.keep("lstm", keep, tokens)
    return _op(x_BT4H, weight_4HH, hidden_BH, cell_BH, segments_BT, keep)
