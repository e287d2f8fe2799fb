"""Attention with any weights: all scores of a call at once, for what no fused kernel computes.

Memory is rows * heads * tokens * keys; a fused form is the way to long sequences.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention import View, ancestors, slot_index


def weighted(
    q_BTHK: Tensor,
    view: View,
    weigh: Callable[[Tensor], Tensor],
    scale: float | None = None,
    window: int = 0,
    mask: str = "causal",
    slopes_H: Tensor | None = None,
) -> Tensor:
    """The values of what each query reads, summed with weights of its scores: (B, T, H, V) in q's dtype, 0 at padding.

    weigh: scores (B, G, M, T, S) fp32, -inf where nothing is read, to weights of that shape, 0 there; M query heads
    share a key head. The rest as in `kernels.attention`.
    """
    keys_BSGK, values_BSGV, reads_BTS, near_BTS = flat(view, window, mask)
    q_BTGMK = q_BTHK.unflatten(2, (keys_BSGK.shape[2], -1))
    scores = torch.einsum("btgmk,bsgk->bgmts", q_BTGMK.float(), keys_BSGK.float())
    scores = scores * (q_BTHK.shape[-1] ** -0.5 if scale is None else scale)
    if slopes_H is not None:
        scores = scores - slopes_H.view(*scores.shape[1:3], 1, 1) * near_BTS[:, None, None]
    scores = scores.masked_fill(~reads_BTS[:, None, None], -torch.inf)
    y_BTGMV = torch.einsum("bgmts,bsgv->btgmv", weigh(scores).to(values_BSGV.dtype), values_BSGV)
    y_BTHV = y_BTGMV.flatten(2, 3).to(q_BTHK.dtype)
    return y_BTHV if view.segments_BT is None else y_BTHV * (view.segments_BT >= 0)[..., None, None]


def flat(view: View, window: int, mask: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys (B, S, G, K) and values (B, S, G, V) of past and call in one line; which of them each token reads, and how
    far back they are, (B, T, S). Padding reads itself, so that no row of scores is empty."""
    k, v = view.new["k"], view.new["v"]
    rows, tokens = k.shape[:2]
    columns_T = torch.arange(tokens, device=k.device)
    segments_BT = columns_T.new_zeros(rows, tokens) if view.segments_BT is None else view.segments_BT
    length_B = columns_T.new_zeros(rows) if view.length_B is None else view.length_B
    at_BT = columns_T + length_B[:, None] if view.positions_BT is None else view.positions_BT
    index_BS, reads_BTS = at_BT, segments_BT[:, :, None] == segments_BT[:, None]
    reads_BTS = reads_BTS & (columns_T <= columns_T[:, None]) if mask == "causal" else reads_BTS
    reads_BTS = reads_BTS if view.parents_BT is None else reads_BTS & ancestors(view.parents_BT)
    if view.past:
        past = {
            name: pool if view.table_BN is None else pool[view.table_BN].flatten(1, 2)
            for name, pool in view.past.items()
        }
        slot_BS = slot_index(length_B, view.capacity)
        filled_BS = slot_BS >= 0
        k, v = (
            torch.cat([torch.where(filled_BS[..., None, None], past[name], 0).to(new.dtype), new], 1)
            for name, new in (("k", k), ("v", v))
        )
        before_BTS = (segments_BT == 0)[..., None] & filled_BS[:, None]
        reads_BTS, index_BS = torch.cat([before_BTS, reads_BTS], 2), torch.cat([slot_BS, at_BT], 1)
    near_BTS = at_BT[..., None] - index_BS[:, None]
    if window:
        reads_BTS = reads_BTS & (near_BTS < window)
    itself_TS = torch.arange(reads_BTS.shape[2], device=k.device) == (columns_T + reads_BTS.shape[2] - tokens)[:, None]
    reads_BTS = torch.where((segments_BT >= 0)[..., None], reads_BTS, itself_TS)
    return k, v, reads_BTS, near_BTS.abs()
