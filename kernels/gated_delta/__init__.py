"""The gated delta rule: a matrix memory that forgets by a gate and corrects what a key recalls."""

from torch import Tensor

from kernels import memory, op, recurrence
from kernels.gated_delta.chunked import chunked, grad
from kernels.gated_delta.reference import reference


def _fake(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay: Tensor | None,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return memory.empty(q_BTHK, v_BTHV, keep, reads=True)


_op = op.Op("gated_delta", reference, chunked, _fake, grad=grad, saved=3)


def gated_delta(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay: Tensor | None,
    beta_BTH: Tensor,
    *,
    scale: float | None = None,
    state_BHKV: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """For each token S = exp(decay) S; S = S + beta k (v - S^T k)^T; y = scale S^T q.

    q, k (B, T, H, K), v (B, T, H, V); beta (B, T, H); decay, the log of the gate, at most 0: (B, T, H) (arXiv
    2412.06464), (B, T, H, K) for one per channel (KDA, 2510.26692: S = diag(exp(decay)) S first), or None for the
    plain delta rule (2406.06484). Meant for keys of about unit length: beta |k|^2 above 2 makes the memory grow.
    scale: K**-0.5 when None.
    state_BHKV: (B, H, K, V) carried in; None is zeros.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    Returns y (B, T, H, V) in v's dtype and the state after, fp32 (fp64 for fp64): (B, H, K, V), or with keep
    (B, keep+1, H, K, V): before the last `keep` columns and after each.
    Raises ValueError or TypeError naming the argument.
    """
    name = "gated_delta"
    same, by_head = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK}, {"beta_BTH": beta_BTH}
    recurrence.checked(name, same, v_BTHV, state_BHKV, segments_BT, keep, by_head, decay)
    scale = q_BTHK.shape[3] ** -0.5 if scale is None else float(scale)
    return _op(q_BTHK, k_BTHK, v_BTHV, decay, beta_BTH, state_BHKV, segments_BT, scale, keep)
