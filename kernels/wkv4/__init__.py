"""The attention of RWKV-4: an average of values, weighted by keys and by how long ago, as a recurrence per channel."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.wkv4.chunked import chunked, grad, spans
from kernels.wkv4.reference import FRESH, reference


def _fake(
    k_BTD: Tensor,
    v_BTD: Tensor,
    decay_D: Tensor,
    bonus_D: Tensor,
    state_B3D: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, _, size = k_BTD.shape
    moments = (keep + 1,) if keep else ()
    wide = torch.promote_types(v_BTD.dtype, torch.float32)
    y = torch.empty_like(v_BTD, memory_format=torch.contiguous_format)
    state = v_BTD.new_empty(rows, *moments, 3, size, dtype=wide)
    return y, state, state.new_empty(len(list(spans(k_BTD))), rows, 3, size)


_op = op.Op("wkv4", reference, chunked, _fake, grad=grad, saved=1)


def wkv4(
    k_BTD: Tensor,
    v_BTD: Tensor,
    decay_D: Tensor,
    bonus_D: Tensor,
    *,
    state_B3D: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """y_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same sum without v) (arXiv 2305.13048).

    k, v (B, T, D); decay w (D), the log of what a step leaves, at most 0 (RWKV-4 keeps log(-w)); bonus u (D).
    state_B3D: (B, 3, D) carried in, fp32: the sums with and without v, both over e^m, and m, the largest exponent in
    them. None is no token yet: 0, 0 and -1e30, which is as good as -inf and stays a number in differences.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    Returns y (B, T, D) in v's dtype and the state after, fp32 (fp64 for fp64): (B, 3, D), or with keep
    (B, keep+1, 3, D): before the last `keep` columns and after each.
    Raises ValueError or TypeError naming the argument.
    """
    check.shape("wkv4", "k_BTD", k_BTD, (None, None, None), "(B, T, D)")
    rows, tokens, size = k_BTD.shape
    check.shape("wkv4", "v_BTD", v_BTD, tuple(k_BTD.shape), f"{tuple(k_BTD.shape)}, the shape of k_BTD")
    check.shape("wkv4", "decay_D", decay_D, (size,), f"(D={size},)")
    check.shape("wkv4", "bonus_D", bonus_D, (size,), f"(D={size},)")
    given = {"k_BTD": k_BTD, "v_BTD": v_BTD, "decay_D": decay_D, "bonus_D": bonus_D}
    if state_B3D is not None:
        check.shape("wkv4", "state_B3D", state_B3D, (rows, 3, size), f"(B={rows}, 3, D={size})")
        given["state_B3D"] = state_B3D
    for name, x in given.items():
        check.floating("wkv4", name, x)
        check.device("wkv4", name, x, k_BTD)
    check.segments("wkv4", segments_BT, rows, tokens)
    if segments_BT is not None:
        check.device("wkv4", "segments_BT", segments_BT, k_BTD)
    check.keep("wkv4", keep, tokens)
    return _op(k_BTD, v_BTD, decay_D, bonus_D, state_B3D, segments_BT, keep)


__all__ = ["FRESH", "wkv4"]
