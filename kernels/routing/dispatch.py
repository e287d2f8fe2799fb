"""From experts of tokens to tokens of experts."""

import torch
from torch import Tensor

from kernels import check


def dispatch(experts_Nk: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(order, counts): how to sort the N k choices by expert, as `grouped_matmul` wants them.

    experts (N, k) int64 in 0..count - 1. order (M = N k) int64: choice order[m] of experts.flatten() is row m, equal
    experts stay in the order of tokens; its token is order[m] // k. counts (count) int64: rows of each expert.
        x_MD = x_ND[order // k]; ...; y_ND.index_add_(0, order // k, y_MD * weights_Nk.flatten()[order, None])
    Plain torch; nothing waits for a GPU.
    """
    check.shape("dispatch", "experts_Nk", experts_Nk, (None, None), "(N, k)")
    check.whole("dispatch", "experts_Nk", experts_Nk)
    if count < 1:
        raise ValueError(f"dispatch: count={count} must be at least 1")
    # Narrow keys sort several times faster.
    keys = experts_Nk.flatten().to(torch.int16 if count < 2**15 else torch.int32)
    ordered, order = keys.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(count + 1, device=keys.device, dtype=keys.dtype))
    return order, ends.diff()
