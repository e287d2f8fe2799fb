"""Grouped products for CPUs: a product for each run that is not empty, written where it belongs."""

import torch
from torch import Tensor

from kernels.grouped_matmul.reference import sizes


def chunked(x_MD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """As `reference`; cannot be recorded by autograd."""
    y_MF = x_MD.new_empty(len(x_MD), weight_EDF.shape[2])
    for e, run in _runs(counts_E, len(x_MD)):
        torch.mm(x_MD[run], weight_EDF[e], out=y_MF[run])
    return y_MF


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """dx = dy W^T and dW = x^T dy of each run; dW is 0 where there are no rows."""
    x_MD, weight_EDF, counts_E = args
    dx_MD = torch.empty_like(x_MD, memory_format=torch.contiguous_format) if needs[0] else None
    dw_EDF = torch.zeros_like(weight_EDF, memory_format=torch.contiguous_format) if needs[1] else None
    for e, run in _runs(counts_E, len(x_MD)):
        if needs[0]:
            torch.mm(grads[0][run], weight_EDF[e].T, out=dx_MD[run])
        if needs[1]:
            torch.mm(x_MD[run].T, grads[0][run], out=dw_EDF[e])
    return [found for found in (dx_MD, dw_EDF) if found is not None]


def _runs(counts_E: Tensor, rows: int) -> list[tuple[int, slice]]:
    runs, start = [], 0
    for e, count in enumerate(sizes(counts_E, rows)):
        if count:
            runs.append((e, slice(start, start + count)))
        start += count
    return runs
