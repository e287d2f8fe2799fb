"""The generalised delta rule: decay per channel, and a rank-one change that reads along a and writes along b."""

from torch import Tensor

from kernels import memory, op, recurrence
from kernels.generalized_delta.chunked import chunked, grad
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return memory.empty(q_BTHK, v_BTHV, keep, reads=True)


_op = op.Op("generalized_delta", reference, chunked, _fake, grad=grad, saved=3)


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
    same = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "decay_BTHK": decay_BTHK, "a_BTHK": a_BTHK, "b_BTHK": b_BTHK}
    recurrence.checked(name, same, v_BTHV, state_BHKV, segments_BT, keep)
    return _op(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, a_BTHK, b_BTHK, state_BHKV, segments_BT, float(scale), keep)
