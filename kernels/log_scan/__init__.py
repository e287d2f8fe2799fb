"""The elementwise linear recurrence on logarithms, under minGRU, minLSTM and log-space RNNs."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.log_scan.chunked import chunked
from kernels.log_scan.reference import reference


def _fake(
    log_a_BTD: Tensor,
    log_b_BTD: Tensor,
    sign_a_BTD: Tensor | None,
    sign_b_BTD: Tensor | None,
    log_state_BD: Tensor | None,
    sign_state_BD: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, _, size = log_a_BTD.shape
    y = torch.empty_like(log_a_BTD, memory_format=torch.contiguous_format)
    moments = (keep + 1,) if keep else ()
    state = y.new_empty(rows, *moments, size, dtype=torch.promote_types(y.dtype, torch.float32))
    return y, torch.empty_like(y, dtype=torch.int8), state, torch.empty_like(state, dtype=torch.int8)


_op = op.Op("log_scan", reference, chunked, _fake)


def log_scan(
    log_a_BTD: Tensor,
    log_b_BTD: Tensor,
    *,
    sign_a_BTD: Tensor | None = None,
    sign_b_BTD: Tensor | None = None,
    log_state_BD: Tensor | None = None,
    sign_state_BD: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t, every number given and returned as log|.| and sign (arXiv 2311.06281, 2410.01201).

    log_a, log_b (B, T, D) floating point, -inf is 0; sign_a, sign_b (B, T, D) int8 of -1, 0, 1, None is all positive.
    log_state, sign_state: (B, D), h before the first token; a log_state of None is 0.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output log 0, no effect).
    Returns log|h| (B, T, D) in log_a's dtype, its sign in int8, and the same of the state after, (B, D), or with keep
    (B, keep+1, D): before the last `keep` columns and after each; its log in fp32 (fp64 for fp64).
    h is exact relative to the largest of the terms it is the sum of. Where h is 0 its log is -inf, its sign 0, and the
    gradient of that log counts as 0; gradients of later outputs go through it as they do through other values.
    Raises ValueError or TypeError naming the argument.
    """
    check.shape("log_scan", "log_a_BTD", log_a_BTD, (None, None, None), "(B, T, D)")
    rows, tokens, size = log_a_BTD.shape
    line, start = f"(B={rows}, T={tokens}, D={size})", f"(B={rows}, D={size})"
    for name, value, want, what in (
        ("log_a_BTD", log_a_BTD, (rows, tokens, size), line),
        ("log_b_BTD", log_b_BTD, (rows, tokens, size), line),
        ("sign_a_BTD", sign_a_BTD, (rows, tokens, size), line),
        ("sign_b_BTD", sign_b_BTD, (rows, tokens, size), line),
        ("log_state_BD", log_state_BD, (rows, size), start),
        ("sign_state_BD", sign_state_BD, (rows, size), start),
    ):
        if value is None and name != "log_b_BTD":
            continue
        check.shape("log_scan", name, value, want, what)
        check.device("log_scan", name, value, log_a_BTD)
        if name.startswith("sign"):
            check.dtype("log_scan", name, value, torch.int8)
        else:
            check.floating("log_scan", name, value)
    if sign_state_BD is not None and log_state_BD is None:
        raise ValueError("log_scan: sign_state_BD needs log_state_BD")
    check.segments("log_scan", segments_BT, rows, tokens)
    check.keep("log_scan", keep, tokens)
    return _op(log_a_BTD, log_b_BTD, sign_a_BTD, sign_b_BTD, log_state_BD, sign_state_BD, segments_BT, keep)
