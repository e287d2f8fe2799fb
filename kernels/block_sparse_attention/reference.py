"""Attention to selected blocks of keys, the definition: one query column at a time against everything that exists."""

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
    blocks_BTGN: Tensor,
    scale: float,
    block: int,
    linear: bool,
) -> Tensor:
    """y (B, T, H, V); positions_BT and segments_BT are given together or not at all."""
    rows, tokens, heads, _ = q_BTHK.shape
    groups = k_BTGK.shape[2]
    columns_T = torch.arange(tokens, device=q_BTHK.device)
    if segments_BT is None:
        segments_BT = columns_T.new_zeros(rows, tokens)
        positions_BT = columns_T + (columns_T.new_zeros(rows, 1) if past_k is None else length_B[:, None])
    keys, values, at_BS = k_BTGK, v_BTGV, positions_BT
    if past_k is not None:
        if table_BN is not None:
            past_k, past_v = past_k[table_BN].flatten(1, 2), past_v[table_BN].flatten(1, 2)
        index_BS = slot_index(length_B, past_k.shape[1])
        empty = (index_BS < 0)[..., None, None]
        keys = torch.cat([torch.where(empty, 0, past_k.to(q_BTHK.dtype)), keys], 1)
        values = torch.cat([torch.where(empty, 0, past_v.to(q_BTHK.dtype)), values], 1)
        at_BS = torch.cat([index_BS, at_BS], 1)
    keys = keys.repeat_interleave(heads // groups, 2)
    values = values.repeat_interleave(heads // groups, 2)
    outputs = []
    for t in range(tokens):
        here_B1 = segments_BT[:, t, None]
        sees = (segments_BT == here_B1) & (here_B1 >= 0) & (columns_T <= t)
        if past_k is not None:
            sees = torch.cat([(index_BS >= 0) & (here_B1 == 0), sees], 1)
        chosen_BGS = (at_BS[:, None, :, None] // block == blocks_BTGN[:, t, :, None]).any(3)
        sees_BHS = (sees[:, None] & chosen_BGS).repeat_interleave(heads // groups, 1)
        logits = torch.einsum("bhk,bshk->bhs", q_BTHK[:, t], keys) * scale
        some = sees_BHS.any(2, keepdim=True)
        if linear:
            weights = logits.masked_fill(~sees_BHS, 0)
        else:
            weights = logits.masked_fill(~sees_BHS & some, -torch.inf).softmax(-1)
        outputs.append(torch.where(some, torch.einsum("bhs,bshv->bhv", weights, values), 0))
    return torch.stack(outputs, 1) if outputs else q_BTHK.new_zeros(rows, 0, heads, v_BTGV.shape[3])
