"""The gated delta rule: a matrix memory that forgets by a gate and corrects what a key recalls."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.gated_delta.chunked import chunked
from kernels.gated_delta.reference import reference


def _fake(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTH: Tensor,
    beta_BTH: Tensor,
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


_op = op.Op("gated_delta", reference, chunked, _fake)


def gated_delta(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    scale: float | None = None,
    state_BHKV: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """For each token S = exp(decay) S; S = S + beta k (v - S^T k)^T; y = scale S^T q.

    q, k (B, T, H, K), v (B, T, H, V); decay (B, T, H), the log of the gate, at most 0; beta (B, T, H).
    scale: K**-0.5 when None. state_BHKV: (B, H, K, V) carried in; None is zeros.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    Returns y (B, T, H, V) in v's dtype and the state after, fp32 (fp64 for fp64): (B, H, K, V), or with keep
    (B, keep+1, H, K, V): before the last `keep` columns and after each.
    Raises ValueError or TypeError naming the argument.
    """
    name = "gated_delta"
    check.shape(name, "q_BTHK", q_BTHK, (None, None, None, None), "(B, T, H, K)")
    rows, tokens, heads, size = q_BTHK.shape
    check.shape(name, "k_BTHK", k_BTHK, tuple(q_BTHK.shape), f"{tuple(q_BTHK.shape)}, the shape of q_BTHK")
    start = f"(B={rows}, T={tokens}, H={heads}"
    check.shape(name, "v_BTHV", v_BTHV, (rows, tokens, heads, None), f"{start}, V)")
    check.shape(name, "decay_BTH", decay_BTH, (rows, tokens, heads), f"{start})")
    check.shape(name, "beta_BTH", beta_BTH, (rows, tokens, heads), f"{start})")
    for label, x in zip(
        ("q_BTHK", "k_BTHK", "v_BTHV", "decay_BTH", "beta_BTH"),
        (q_BTHK, k_BTHK, v_BTHV, decay_BTH, beta_BTH),
        strict=True,
    ):
        check.floating(name, label, x)
    if state_BHKV is not None:
        want = (rows, heads, size, v_BTHV.shape[3])
        check.shape(name, "state_BHKV", state_BHKV, want, f"(B, H, K, V) = {want}")
    check.segments(name, segments_BT, rows, tokens)
    check.keep(name, keep, tokens)
    scale = size**-0.5 if scale is None else float(scale)
    return _op(q_BTHK, k_BTHK, v_BTHV, decay_BTH, beta_BTH, state_BHKV, segments_BT, scale, keep)
