"""Softmax attention over whatever a `View` shows: this call's tokens and a past, contiguous or paged."""

from torch import Tensor

from kernels import check, op
from kernels.attention.chunked import chunked, grad, twice
from kernels.attention.reference import reference
from kernels.attention.view import View, slot_index

__all__ = ["View", "attention", "slot_index"]


def _fake(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    length_B: Tensor | None,
    positions_BT: Tensor | None,
    segments_BT: Tensor | None,
    table_BN: Tensor | None,
    scale: float,
    window: int,
    causal: bool,
) -> Tensor:
    return q_BTHK.new_empty(*q_BTHK.shape[:3], v_BTGV.shape[3])


_op = op.Op("attention", reference, chunked, _fake, grad=grad, twice=twice)


def attention(
    q_BTHK: Tensor, view: View, *, scale: float | None = None, window: int = 0, mask: str = "causal"
) -> Tensor:
    """Softmax attention of each query over the tokens of its own document.

    q (B, T, H, K); view.new["k"] (B, T, G, K), view.new["v"] (B, T, G, V), H a multiple of G; view.past the same
    names, (B, S, G, ..) or a pool (P, Z, G, ..) with view.table_BN, of any floating dtype.
    mask: "causal", or "full" for every token of the document in this call and the past.
    window: 0 for none, else only tokens whose position is above the query's - window.
    scale: K**-0.5 when None. Returns y (B, T, H, V) in q's dtype, 0 at padding.
    Raises ValueError or TypeError naming the argument.
    """
    name = "attention"
    check.shape(name, "q_BTHK", q_BTHK, (None, None, None, None), "(B, T, H, K)")
    check.floating(name, "q_BTHK", q_BTHK)
    rows, tokens, heads, size = q_BTHK.shape
    for entry in ("k", "v"):
        if entry not in view.new:
            raise ValueError(f"attention: view.new must have 'k' and 'v', got {sorted(view.new)}")
        if view.past and entry not in view.past:
            raise ValueError(f"attention: view.past must have 'k' and 'v', got {sorted(view.past)}")
    k, v = view.new["k"], view.new["v"]
    check.shape(name, 'view.new["k"]', k, (rows, tokens, None, size), f"(B={rows}, T={tokens}, G, K={size})")
    groups = k.shape[2]
    check.shape(name, 'view.new["v"]', v, (rows, tokens, groups, None), f"(B={rows}, T={tokens}, G={groups}, V)")
    if groups == 0 or heads % groups:
        raise ValueError(f"attention: H={heads} of q_BTHK must be a multiple of G={groups} of view.new")
    if k.dtype != q_BTHK.dtype or v.dtype != q_BTHK.dtype:
        raise TypeError(f"attention: view.new must have q_BTHK's dtype {q_BTHK.dtype}, got {k.dtype} and {v.dtype}")
    past_k = past_v = length_B = table_BN = None
    if view.past:
        past_k, past_v, length_B, table_BN = view.past["k"], view.past["v"], view.length_B, view.table_BN
        first, what = (rows, f"(B={rows}, S") if table_BN is None else (None, "(P, Z")
        check.shape(name, 'view.past["k"]', past_k, (first, None, groups, size), f"{what}, G={groups}, K={size})")
        slots, size_v = past_k.shape[1], v.shape[3]
        want = (past_k.shape[0], slots, groups, size_v)
        check.shape(name, 'view.past["v"]', past_v, want, f"{want}, as view.past['k'] and view.new['v']")
        if length_B is None:
            raise ValueError("attention: view.length_B must be given with a past")
        check.shape(name, "view.length_B", length_B, (rows,), f"(B={rows},)")
        check.whole(name, "view.length_B", length_B)
        if table_BN is not None:
            check.shape(name, "view.table_BN", table_BN, (rows, None), f"(B={rows}, N)")
            check.whole(name, "view.table_BN", table_BN)
    if view.positions_BT is not None:
        check.shape(name, "view.positions_BT", view.positions_BT, (rows, tokens), f"(B={rows}, T={tokens})")
        check.whole(name, "view.positions_BT", view.positions_BT)
    check.segments(name, view.segments_BT, rows, tokens)
    if window < 0:
        raise ValueError(f"attention: window={window} must be 0 (none) or a number of tokens")
    if mask not in ("causal", "full"):
        raise ValueError(f"attention: mask={mask!r} must be 'causal' or 'full'")
    if past_k is not None and past_k.shape[1] * (1 if table_BN is None else table_BN.shape[1]) == 0:
        past_k = past_v = length_B = table_BN = None  # no slots: nothing to read
    scale = size**-0.5 if scale is None else float(scale)
    past = (past_k, past_v, length_B, view.positions_BT, view.segments_BT, table_BN)
    return _op(q_BTHK, k, v, *past, scale, int(window), mask == "causal")
