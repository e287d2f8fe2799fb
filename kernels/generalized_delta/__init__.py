"""The generalised delta rule: decay per channel, and a rank-one change that reads along a and writes along b."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.generalized_delta.chunked import chunked
from kernels.generalized_delta.reference import reference


def _fake(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
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


_op = op.Op("generalized_delta", reference, chunked, _fake)


def generalized_delta(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    *,
    scale: float = 1.0,
    state_BHKV: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """For each token S' = diag(exp(decay)) S + b (S^T a)^T + k v^T; y = scale S'^T q (RWKV-7, arXiv 2503.14456).

    S is (K, V). Its transpose M follows the row form M' = M (diag(exp(decay)) + a b^T) + v k^T: a reads the memory as
    it was before the token, not decayed, and the answer is written along b. With a = exp(decay) k, b = -beta k and
    beta k in place of k it is the gated delta rule.
    q, k, a, b (B, T, H, K), v (B, T, H, V); decay (B, T, H, K), the log of the gate of each channel, at most 0.
    state_BHKV: (B, H, K, V) carried in; None is zeros.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    Returns y (B, T, H, V) in v's dtype and the state after, fp32 (fp64 for fp64): (B, H, K, V), or with keep
    (B, keep+1, H, K, V): before the last `keep` columns and after each.
    Raises ValueError or TypeError naming the argument.
    """
    name = "generalized_delta"
    check.shape(name, "q_BTHK", q_BTHK, (None, None, None, None), "(B, T, H, K)")
    rows, tokens, heads, size = q_BTHK.shape
    inputs = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "decay_BTHK": decay_BTHK, "a_BTHK": a_BTHK, "b_BTHK": b_BTHK}
    for label, x in inputs.items():
        check.shape(name, label, x, tuple(q_BTHK.shape), f"{tuple(q_BTHK.shape)}, the shape of q_BTHK")
        check.floating(name, label, x)
    check.shape(name, "v_BTHV", v_BTHV, (rows, tokens, heads, None), f"(B={rows}, T={tokens}, H={heads}, V)")
    check.floating(name, "v_BTHV", v_BTHV)
    if state_BHKV is not None:
        want = (rows, heads, size, v_BTHV.shape[3])
        check.shape(name, "state_BHKV", state_BHKV, want, f"(B, H, K, V) = {want}")
    check.segments(name, segments_BT, rows, tokens)
    check.keep(name, keep, tokens)
    return _op(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, a_BTHK, b_BTHK, state_BHKV, segments_BT, float(scale), keep)
