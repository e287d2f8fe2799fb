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
    slopes_H: Tensor | None,
    sinks_H: Tensor | None,
    parents_BT: Tensor | None,
    scale: float,
    window: int,
    causal: bool,
    softcap: float,
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
    tree_BTT = torch.zeros(rows, tokens, tokens, dtype=torch.bool, device=q_BTHK.device)
    for t in range(tokens):
        here_B1, at_B1 = segments_BT[:, t, None], positions_BT[:, t, None]
        sees = (segments_BT == here_B1) & (here_B1 >= 0)
        if causal:
            sees = sees & (columns_T <= t)
        if window:
            sees = sees & (positions_BT > at_B1 - window)
        if parents_BT is not None:
            parent_B = parents_BT[:, t]
            of_parent_BT = tree_BTT[torch.arange(rows, device=parent_B.device), parent_B.clamp(min=0)]
            tree_BTT[:, t] = (of_parent_BT & (parent_B >= 0)[:, None]) | (columns_T == t)
            sees = sees & tree_BTT[:, t]
        near_BS = at_B1 - positions_BT
        if past_k is not None:
            before = (index_BS >= 0) & (here_B1 == 0)
            if window:
                before = before & (index_BS > at_B1 - window)
            sees, near_BS = torch.cat([before, sees], 1), torch.cat([at_B1 - index_BS, near_BS], 1)
        logits = torch.einsum("bhk,bshk->bhs", q_BTHK[:, t], keys) * scale
        if softcap:
            logits = softcap * (logits / softcap).tanh()
        if slopes_H is not None:
            logits = logits - slopes_H[:, None] * near_BS[:, None].abs()
        # A query that sees nothing is padding: any finite weights do, its output is set to zero.
        logits = logits.masked_fill((~sees & sees.any(1, keepdim=True))[:, None], -torch.inf)
        if sinks_H is not None:
            logits = torch.cat([logits, sinks_H.to(logits.dtype)[:, None].expand(rows, -1, 1)], 2)
        weights = logits.softmax(-1)[..., : keys.shape[1]]
        y_BHV = torch.einsum("bhs,bshv->bhv", weights.to(values.dtype), values)
        outputs.append(torch.where((here_B1 >= 0)[..., None], y_BHV, 0))
    return torch.stack(outputs, 1) if outputs else q_BTHK.new_zeros(rows, 0, heads, v_BTGV.shape[3])
