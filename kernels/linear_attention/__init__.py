"""Linear attention: retention, SSD (Mamba-2), lightning and gated linear attention, with or without a normaliser."""

import torch
from torch import Tensor

from kernels import memory, op, recurrence
from kernels.linear_attention.chunked import chunked, grad
from kernels.linear_attention.reference import reference


def _fake(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return memory.empty(q_BTHK, v_BTHV, keep, reads=False)


_op = op.Op("linear_attention", reference, chunked, _fake, grad=grad, saved=1)


def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalize: bool = False,
    floor_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """For each token S = exp(decay) S + k v^T; y = scale S^T q.

    q, k (B, T, H, K), v (B, T, H, V); decay, the log of the gate, at most 0: (B, T, H) (retention, arXiv 2307.08621;
    SSD, 2405.21060), (B, T, H, K) for one per channel (GLA, 2312.06635: S = diag(exp(decay)) S + k v^T), or None, which
    never forgets.
    normalize: y = S^T q / (z . q) with z = exp(decay) z + k, the running sum of keys; scale cancels out. z is the
    state's last column: the state is (B, H, K, V + 1). y is 0 where z . q is 0.
    floor_BTH: with normalize, (B, T, H): y = scale S^T q / max(|scale z . q|, floor), as mLSTM divides (2405.04517:
    floor exp(-m), keys multiplied by exp(i - m), decay f + m_before - m).
    state_BHKV: (B, H, K, V) carried in; None is zeros.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    Returns y (B, T, H, V) in v's dtype and the state after, fp32 (fp64 for fp64): (B, H, K, V), or with keep
    (B, keep+1, H, K, V): before the last `keep` columns and after each.
    Raises ValueError or TypeError naming the argument.
    """
    name = "linear_attention"
    values = v_BTHV
    if normalize and isinstance(v_BTHV, Tensor) and v_BTHV.dim() == 4:
        values = torch.cat([v_BTHV, torch.ones_like(v_BTHV[..., :1])], -1)
    by_head = {} if floor_BTH is None else {"floor_BTH": floor_BTH}
    same = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK}
    recurrence.checked(name, same, values, state_BHKV, segments_BT, keep, by_head, decay)
    if floor_BTH is not None and not normalize:
        raise ValueError(f"{name}: floor_BTH is a bound of the normaliser: set normalize=True")
    if not normalize:
        return _op(q_BTHK, k_BTHK, v_BTHV, decay, state_BHKV, segments_BT, float(scale), keep)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))  # the division comes before the rounding
    y, state = _op(q_BTHK, k_BTHK, wide, decay, state_BHKV, segments_BT, float(scale), keep)
    y, divisor = y.split([v_BTHV.shape[3], 1], -1)
    if floor_BTH is not None:
        if segments_BT is not None:
            floor_BTH = floor_BTH.masked_fill((segments_BT < 0)[..., None], 0)
        divisor = torch.maximum(divisor.abs(), floor_BTH[..., None].to(divisor.dtype))
    empty = divisor == 0
    y = torch.where(empty, 0, y / torch.where(empty, 1, divisor))
    return y.to(v_BTHV.dtype), state
