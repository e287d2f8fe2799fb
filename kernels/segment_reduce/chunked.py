"""Sums, means and maxima of segments on CPUs: torch's scatter, and gathers for the gradient."""

import torch
from torch import Tensor

from kernels.segment_reduce.reference import check_segments


def chunked(x_ED: Tensor, segments_E: Tensor, count: int, reduce: str) -> Tensor:
    """As `reference`."""
    check_segments(segments_E, count)
    return _reduced(_wide(x_ED), segments_E, count, reduce).to(x_ED.dtype)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """Each row has the gradient of its segment: of a mean its share, of a maximum what equals leave to each other."""
    x_ED, segments_E, count, reduce = args
    g_ND = _wide(grads[0])
    if reduce == "mean":
        g_ND = g_ND / _rows(segments_E, count, g_ND.dtype)
    if reduce != "max":
        return [g_ND.index_select(0, segments_E).to(x_ED.dtype)]
    wide_ED = _wide(x_ED)
    most_ND = _reduced(wide_ED, segments_E, count, "max")
    largest_ED = (wide_ED == most_ND.index_select(0, segments_E)).to(g_ND.dtype)
    share_ND = g_ND / _reduced(largest_ED, segments_E, count, "sum").clamp(min=1)
    return [largest_ED.mul_(share_ND.index_select(0, segments_E)).to(x_ED.dtype)]


def _reduced(wide_ED: Tensor, segments_E: Tensor, count: int, reduce: str) -> Tensor:
    start_ND = wide_ED.new_zeros(count, wide_ED.shape[1])
    if reduce == "max":
        return start_ND.scatter_reduce(0, segments_E[:, None].expand_as(wide_ED), wide_ED, "amax", include_self=False)
    total_ND = start_ND.index_add(0, segments_E, wide_ED)
    return total_ND if reduce == "sum" else total_ND / _rows(segments_E, count, wide_ED.dtype)


def _rows(segments_E: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Rows of each segment (count, 1), at least 1."""
    return segments_E.bincount(minlength=count).clamp(min=1).to(dtype)[:, None]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
