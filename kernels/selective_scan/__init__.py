"""Mamba's selective scan (S6)."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.selective_scan.chunked import SCANS, blocks, chunked, grad
from kernels.selective_scan.reference import reference


def _fake(
    x_BTD: Tensor,
    step_BTD: Tensor,
    a_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    d_D: Tensor | None,
    state_BDN: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
    scan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x_BTD.shape[0]
    y = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    moments = (keep + 1,) if keep else ()
    state = y.new_empty(rows, *moments, *a_DN.shape, dtype=torch.promote_types(y.dtype, torch.float32))
    return y, state, state.new_empty(len(list(blocks(x_BTD, a_DN))), rows, a_DN.shape[0] * a_DN.shape[1])


_op = op.Op("selective_scan", reference, chunked, _fake, grad=grad, saved=1)


def selective_scan(
    x_BTD: Tensor,
    step_BTD: Tensor,
    a_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    d_D: Tensor | None = None,
    *,
    state_BDN: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
    scan: str = "chunked",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(step_t A) h_{t-1} + step_t x_t B_t;  y_t = C_t . h_t + D x_t  (Mamba, arXiv 2312.00752).

    x, step (B, T, D), step > 0; a (D, N), below 0 to forget; b, c (B, T, N); d (D) or None. All floating point.
    state_BDN: (B, D, N) carried in; None is zeros.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    scan: the algorithm for the recurrence on a CPU, "chunked", "cumsum" or "hillis_steele"; a matter of speed alone.
    "cumsum" needs step * a of at most 0.
    Returns y (B, T, D) in x's dtype, and the state after, fp32 (fp64 for fp64): (B, D, N), or with keep
    (B, keep+1, D, N): before the last `keep` columns and after each.
    Raises ValueError or TypeError naming the argument.
    """
    check.shape("selective_scan", "x_BTD", x_BTD, (None, None, None), "(B, T, D)")
    rows, tokens, size = x_BTD.shape
    check.shape("selective_scan", "a_DN", a_DN, (size, None), f"(D={size}, N), D from x_BTD")
    states = a_DN.shape[1]
    line = f"(B={rows}, T={tokens}"
    for name, value, want, what in (
        ("x_BTD", x_BTD, (rows, tokens, size), f"{line}, D={size})"),
        ("step_BTD", step_BTD, (rows, tokens, size), f"{line}, D={size})"),
        ("a_DN", a_DN, (size, states), f"(D={size}, N={states})"),
        ("b_BTN", b_BTN, (rows, tokens, states), f"{line}, N={states})"),
        ("c_BTN", c_BTN, (rows, tokens, states), f"{line}, N={states})"),
        ("d_D", d_D, (size,), f"(D={size},)"),
        ("state_BDN", state_BDN, (rows, size, states), f"(B={rows}, D={size}, N={states})"),
    ):
        if value is None and name in ("d_D", "state_BDN"):
            continue
        check.shape("selective_scan", name, value, want, what)
        check.floating("selective_scan", name, value)
        check.device("selective_scan", name, value, x_BTD)
    check.segments("selective_scan", segments_BT, rows, tokens)
    check.keep("selective_scan", keep, tokens)
    if scan not in SCANS:
        raise ValueError(f"selective_scan: scan={scan!r} must be one of {', '.join(SCANS)}")
    return _op(x_BTD, step_BTD, a_DN, b_BTN, c_BTN, d_D, state_BDN, segments_BT, keep, scan)
