"""One softmax over several sets of keys, each set read by queries of its own.

    y = softmax([s q^1 . k | sees_1, ..., s q^P . k | sees_P]) [v, ..., v]

The sets are added up by their log-sum-exp, forward and backward, as a ring of ranks does, so no matrix of queries by
keys is ever whole. Here all P queries read the same keys, under different masks, as positions and segments.
"""

import torch
from torch import Tensor

from kernels import op
from kernels.attention.partial import attend, attend_grad, delta_of, merge
from models.layers.compressed import masked_softmax, products, values


def merged_attention(
    q_PBTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    q_positions_PBT: Tensor,
    k_positions_BS: Tensor,
    q_segments_PBT: Tensor,
    k_segments_PBS: Tensor,
    scale: float,
) -> Tensor:
    """y (B, T, H, V) in v's dtype. In set p a query sees keys of its segment number, if it is not negative, up to its
    position; it is 0 where it sees none. All numbers int64, H a multiple of G."""
    args = (q_PBTHK, k_BSGK, v_BSGV, q_positions_PBT, k_positions_BS, q_segments_PBT, k_segments_PBS, scale)
    return _op(*args)[0]


def _forward(
    q_PBTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    q_positions_PBT: Tensor,
    k_positions_BS: Tensor,
    q_segments_PBT: Tensor,
    k_segments_PBS: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y, and lse for `_grad`."""
    y_BTHV = lse_BTH = None
    sets = zip(q_PBTHK, q_positions_PBT, q_segments_PBT, k_segments_PBS, strict=True)
    for q_BTHK, at_BT, inside_BT, keys_BS in sets:
        part, part_lse = attend(q_BTHK, k_BSGK, v_BSGV, at_BT, k_positions_BS, inside_BT, keys_BS, scale)
        if y_BTHV is None:
            y_BTHV, lse_BTH = part, part_lse.contiguous()
        else:
            merge(y_BTHV, lse_BTH, part, part_lse)
    return y_BTHV.to(v_BSGV.dtype), lse_BTH


def _grad(args, outputs, grads, needs) -> list[Tensor]:
    q_PBTHK, k_BSGK, v_BSGV, q_positions_PBT, k_positions_BS, q_segments_PBT, k_segments_PBS, scale = args
    (y, lse), (dy,) = outputs, grads
    delta = delta_of(dy, y)
    dq, dk, dv = [], 0, 0
    sets = zip(q_PBTHK, q_positions_PBT, q_segments_PBT, k_segments_PBS, strict=True)
    for q_BTHK, at_BT, inside_BT, keys_BS in sets:
        places = (at_BT, k_positions_BS, inside_BT, keys_BS)
        part, *found = attend_grad(q_BTHK, k_BSGK, v_BSGV, *places, scale, 0, True, lse, delta, dy)
        dq.append(part)
        dk, dv = dk + found[0], dv + found[1]
    found = (x.to(arg.dtype) for x, arg in zip((torch.stack(dq), dk, dv), args[:3], strict=True))
    return [x for x, need in zip(found, needs[:3], strict=True) if need]


def written_out(
    q_PBTHK, k_BSGK, v_BSGV, q_positions_PBT, k_positions_BS, q_segments_PBT, k_segments_PBS, scale
) -> tuple[Tensor, Tensor]:
    """The definition, with all weights at once: what gradients of gradients are taken of. The second output is none."""
    sees_PBTS = (q_segments_PBT[..., None] == k_segments_PBS[:, :, None]) & (q_segments_PBT >= 0)[..., None]
    sees_PBTS = sees_PBTS & (k_positions_BS[:, None] <= q_positions_PBT[..., None])
    sees = torch.cat(sees_PBTS.unbind(0), -1)[:, :, None, None]
    logits = torch.cat([products(q, k_BSGK) for q in q_PBTHK], -1) * scale
    y = values(masked_softmax(logits, sees), torch.cat([v_BSGV] * len(q_PBTHK), 1))
    return y.to(v_BSGV.dtype), y.new_zeros(y.shape[:3])


def _fake(q_PBTHK, k_BSGK, v_BSGV, *rest) -> tuple[Tensor, Tensor]:
    shape = q_PBTHK.shape[1:4]
    return v_BSGV.new_empty(*shape, v_BSGV.shape[3]), q_PBTHK.new_empty(shape, dtype=torch.float64)


_op = op.register("merged_attention", _forward, _fake, grad=_grad, saved=1, twice=written_out, whole=True)
