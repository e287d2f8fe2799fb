"""Linear attention with an optional scalar decay per head: retention, SSD (Mamba-2), lightning attention."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.linear_attention.chunked import chunked
from kernels.linear_attention.reference import reference


def _fake(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTH: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    rows, _, heads, size = q_BTHK.shape
    moments = (keep + 1,) if keep else ()
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    state = v_BTHV.new_empty(rows, *moments, heads, size, v_BTHV.shape[3], dtype=wide)
    return torch.empty_like(v_BTHV, memory_format=torch.contiguous_format), state


_op = op.Op("linear_attention", reference, chunked, _fake)


def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTH: Tensor | None = None,
    *,
    scale: float = 1.0,
    state_BHKV: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """For each token S = exp(decay) S + k v^T; y = scale S^T q.

    q, k (B, T, H, K), v (B, T, H, V); decay (B, T, H), the log of the gate, at most 0; None never forgets.
    state_BHKV: (B, H, K, V) carried in; None is zeros.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    Returns y (B, T, H, V) in v's dtype and the state after, fp32 (fp64 for fp64): (B, H, K, V), or with keep
    (B, keep+1, H, K, V): before the last `keep` columns and after each.
    Raises ValueError or TypeError naming the argument.
    """
    name = "linear_attention"
    check.shape(name, "q_BTHK", q_BTHK, (None, None, None, None), "(B, T, H, K)")
    rows, tokens, heads, size = q_BTHK.shape
    check.shape(name, "k_BTHK", k_BTHK, tuple(q_BTHK.shape), f"{tuple(q_BTHK.shape)}, the shape of q_BTHK")
    start = f"(B={rows}, T={tokens}, H={heads}"
    check.shape(name, "v_BTHV", v_BTHV, (rows, tokens, heads, None), f"{start}, V)")
    inputs = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHV": v_BTHV}
    if decay_BTH is not None:
        check.shape(name, "decay_BTH", decay_BTH, (rows, tokens, heads), f"{start})")
        inputs["decay_BTH"] = decay_BTH
    for label, x in inputs.items():
        check.floating(name, label, x)
    if state_BHKV is not None:
        want = (rows, heads, size, v_BTHV.shape[3])
        check.shape(name, "state_BHKV", state_BHKV, want, f"(B, H, K, V) = {want}")
    check.segments(name, segments_BT, rows, tokens)
    check.keep(name, keep, tokens)
    return _op(q_BTHK, k_BTHK, v_BTHV, decay_BTH, state_BHKV, segments_BT, float(scale), keep)
