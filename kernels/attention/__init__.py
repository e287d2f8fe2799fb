"""Softmax attention over whatever a `View` shows: this call's tokens and a past, contiguous or paged."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.attention.chunked import chunked, grad, twice
from kernels.attention.reference import reference
from kernels.attention.view import View, ancestors, seen, slot_index

__all__ = ["View", "ancestors", "attention", "checked", "slot_index"]


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
    slopes_H: Tensor | None,
    sinks_H: Tensor | None,
    parents_BT: Tensor | None,
    scale: float,
    window: int,
    causal: bool,
    softcap: float,
) -> Tensor:
    return q_BTHK.new_empty(*q_BTHK.shape[:3], v_BTGV.shape[3])


_op = op.Op("attention", reference, chunked, _fake, grad=grad, twice=twice)


def attention(
    q_BTHK: Tensor,
    view: View,
    *,
    scale: float | None = None,
    window: int = 0,
    mask: str = "causal",
    softcap: float = 0.0,
    slopes_H: Tensor | None = None,
    sinks_H: Tensor | None = None,
    ssmax_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each query over the tokens of its own document.

    q (B, T, H, K); view.new["k"] (B, T, G, K), view.new["v"] (B, T, G, V), H a multiple of G; view.past the same
    names, (B, S, G, ..) or a pool (P, Z, G, ..) with view.table_BN, of any floating dtype.
    mask: "causal", or "full" for every token of the document in this call and the past.
    window: 0 for none, else only tokens whose position is above the query's - window.
    scale: K**-0.5 when None. What else becomes of a logit l = scale * q.k, all per head (H,) and with a gradient:
      softcap   > 0: softcap * tanh(l / softcap) (arXiv 2408.00118);
      slopes_H  l - slope * |position of the query - position of the key| (ALiBi, arXiv 2108.12409);
      sinks_H   one more logit in the softmax, of a value of zeros (gpt-oss, arXiv 2508.10925);
      ssmax_H   l * s * log(n), n the number of tokens the query reads, itself included (arXiv 2501.19399).
    A view of a draft tree needs mask="causal".
    Returns y (B, T, H, V) in q's dtype, 0 at padding. Raises ValueError or TypeError naming the argument.
    """
    name = "attention"
    past = checked(name, q_BTHK, view)
    rows, tokens, heads, size = q_BTHK.shape
    check.window(name, window)
    if mask not in ("causal", "full"):
        raise ValueError(f"attention: mask={mask!r} must be 'causal' or 'full'")
    if not 0 <= softcap < torch.inf:
        raise ValueError(f"attention: softcap={softcap} must be 0 (none) or above, and finite")
    for label, value in (("slopes_H", slopes_H), ("sinks_H", sinks_H), ("ssmax_H", ssmax_H)):
        if value is not None:
            check.shape(name, label, value, (heads,), f"(H={heads},)")
            check.floating(name, label, value)
            check.device(name, label, value, q_BTHK)
    if view.parents_BT is not None:
        check.shape(name, "view.parents_BT", view.parents_BT, (rows, tokens), f"(B={rows}, T={tokens})")
        check.whole(name, "view.parents_BT", view.parents_BT)
        check.device(name, "view.parents_BT", view.parents_BT, q_BTHK)
        if mask != "causal":
            raise ValueError("attention: view.parents_BT needs mask='causal'")
    if ssmax_H is not None:
        wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        count_BT = seen(view, rows, tokens, window, mask == "causal", q_BTHK.device)
        factor_BTH = ssmax_H.to(wide) * count_BT.to(wide).log()[..., None]
        q_BTHK = (q_BTHK * factor_BTH[..., None]).to(q_BTHK.dtype)
    scale = size**-0.5 if scale is None else float(scale)
    options = (slopes_H, sinks_H, view.parents_BT, scale, window, mask == "causal", float(softcap))
    return _op(q_BTHK, view.new["k"], view.new["v"], *past, *options)


def checked(name: str, q_BTHK: Tensor, view: View) -> tuple[Tensor | None, ...]:
    """The view's past k and v, length, positions, segments and table, or one clear error of `name`."""
    check.shape(name, "q_BTHK", q_BTHK, (None, None, None, None), "(B, T, H, K)")
    check.floating(name, "q_BTHK", q_BTHK)
    rows, tokens, heads, size = q_BTHK.shape
    for entry in ("k", "v"):
        if entry not in view.new:
            raise ValueError(f"{name}: view.new must have 'k' and 'v', got {sorted(view.new)}")
        if view.past and entry not in view.past:
            raise ValueError(f"{name}: view.past must have 'k' and 'v', got {sorted(view.past)}")
    k, v = view.new["k"], view.new["v"]
    check.shape(name, 'view.new["k"]', k, (rows, tokens, None, size), f"(B={rows}, T={tokens}, G, K={size})")
    groups = k.shape[2]
    check.shape(name, 'view.new["v"]', v, (rows, tokens, groups, None), f"(B={rows}, T={tokens}, G={groups}, V)")
    if groups == 0 or heads % groups:
        raise ValueError(f"{name}: H={heads} of q_BTHK must be a multiple of G={groups} of view.new")
    if k.dtype != q_BTHK.dtype or v.dtype != q_BTHK.dtype:
        raise TypeError(f"{name}: view.new must have q_BTHK's dtype {q_BTHK.dtype}, got {k.dtype} and {v.dtype}")
    past_k = past_v = length_B = table_BN = None
    if view.past:
        past_k, past_v, length_B, table_BN = view.past["k"], view.past["v"], view.length_B, view.table_BN
        first, what = (rows, f"(B={rows}, S") if table_BN is None else (None, "(P, Z")
        check.shape(name, 'view.past["k"]', past_k, (first, None, groups, size), f"{what}, G={groups}, K={size})")
        slots, size_v = past_k.shape[1], v.shape[3]
        want = (past_k.shape[0], slots, groups, size_v)
        check.shape(name, 'view.past["v"]', past_v, want, f"{want}, as view.past['k'] and view.new['v']")
        check.floating(name, 'view.past["k"]', past_k)
        check.floating(name, 'view.past["v"]', past_v)
        if length_B is None:
            raise ValueError(f"{name}: view.length_B must be given with a past")
        check.shape(name, "view.length_B", length_B, (rows,), f"(B={rows},)")
        check.whole(name, "view.length_B", length_B)
        if table_BN is not None:
            check.shape(name, "view.table_BN", table_BN, (rows, None), f"(B={rows}, N)")
            check.whole(name, "view.table_BN", table_BN)
    if view.positions_BT is not None:
        check.shape(name, "view.positions_BT", view.positions_BT, (rows, tokens), f"(B={rows}, T={tokens})")
        check.whole(name, "view.positions_BT", view.positions_BT)
    check.segments(name, view.segments_BT, rows, tokens)
    places = {"length_B": length_B, "positions_BT": view.positions_BT, "segments_BT": view.segments_BT}
    tensors = {'new["k"]': k, 'new["v"]': v, 'past["k"]': past_k, 'past["v"]': past_v, **places, "table_BN": table_BN}
    for label, value in tensors.items():
        if value is not None:
            check.device(name, f"view.{label}", value, q_BTHK)
    if past_k is not None and past_k.shape[1] * (1 if table_BN is None else table_BN.shape[1]) == 0:
        past_k = past_v = length_B = table_BN = None  # no slots: nothing to read
    return past_k, past_v, length_B, view.positions_BT, view.segments_BT, table_BN
