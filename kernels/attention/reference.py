"""Softmax attention over a view, the definition: one query column at a time against everything that exists."""

import torch
from torch import Tensor

from kernels.attention.view import slot_index


def reference(
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
    """y (B, T, H, V); arguments as `attention` takes them out of its View."""
    rows, tokens, heads, _ = q_BTHK.shape
    columns_T = torch.arange(tokens, device=q_BTHK.device)
    if segments_BT is None:
        segments_BT = columns_T.new_zeros(rows, tokens)
    if positions_BT is None:
        positions_BT = columns_T + (columns_T.new_zeros(rows, 1) if past_k is None else length_B[:, None])
    keys, values = k_BTGK, v_BTGV
    if past_k is not None:
        if table_BN is not None:
            past_k, past_v = past_k[table_BN].flatten(1, 2), past_v[table_BN].flatten(1, 2)
        index_BS = slot_index(length_B, past_k.shape[1])
        empty = (index_BS < 0)[..., None, None]
        keys = torch.cat([torch.where(empty, 0, past_k.to(q_BTHK.dtype)), k_BTGK], 1)
        values = torch.cat([torch.where(empty, 0, past_v.to(q_BTHK.dtype)), v_BTGV], 1)
    keys = keys.repeat_interleave(heads // keys.shape[2], 2)
    values = values.repeat_interleave(heads // values.shape[2], 2)
    outputs = []
    for t in range(tokens):
        here_B1, at_B1 = segments_BT[:, t, None], positions_BT[:, t, None]
        sees = (segments_BT == here_B1) & (here_B1 >= 0)
        if causal:
            sees = sees & (columns_T <= t)
        if window:
            sees = sees & (positions_BT > at_B1 - window)
        if past_k is not None:
            before = (index_BS >= 0) & (here_B1 == 0)
            if window:
                before = before & (index_BS > at_B1 - window)
            sees = torch.cat([before, sees], 1)
        logits = torch.einsum("bhk,bshk->bhs", q_BTHK[:, t], keys) * scale
        # A query that sees nothing is padding: any finite weights do, its output is set to zero.
        logits = logits.masked_fill((~sees & sees.any(1, keepdim=True))[:, None], -torch.inf)
        y_BHV = torch.einsum("bhs,bshv->bhv", logits.softmax(-1), values)
        outputs.append(torch.where((here_B1 >= 0)[..., None], y_BHV, 0))
    return torch.stack(outputs, 1) if outputs else q_BTHK.new_zeros(rows, 0, heads, v_BTGV.shape[3])
