"""The nearest code on CPUs: products say who is near, and among those nearer than rounding can tell, differences.

A block of rows at a time: distances of all rows to all codes are never there together.
"""

import torch
from torch import Tensor

from kernels.nearest_code.bound import bound
from kernels.nearest_code.reference import distances

BLOCK = 1 << 22  # distances held at a time
PAIRS = 1 << 20  # numbers compared exactly at a time


def chunked(x_ND: Tensor, codes_CD: Tensor) -> Tensor:
    """As `reference`."""
    wide = torch.promote_types(torch.promote_types(x_ND.dtype, codes_CD.dtype), torch.float32)
    x_ND, codes_CD = x_ND.to(wide), codes_CD.to(wide)
    half_C = codes_CD.square().sum(1) / 2
    near_N, size = bound(x_ND, half_C), max(1, BLOCK // len(codes_CD))
    found = [torch.zeros(0, dtype=torch.int64, device=x_ND.device)]
    for x, near in zip(x_ND.split(size), near_N.split(size), strict=True):
        score = torch.addmm(half_C, x, codes_CD.T, alpha=-1)
        least, index = score.min(1)
        second = score.scatter_(1, index[:, None], torch.inf).amin(1)
        unsure = (second - least <= near).nonzero()[:, 0]
        if len(unsure):
            candidates = score[unsure] <= (least + near)[unsure, None]
            candidates.scatter_(1, index[unsure, None], True)
            index[unsure] = _exact(x[unsure], codes_CD, candidates)
        found.append(index)
    return torch.cat(found)


def _exact(x_ND: Tensor, codes_CD: Tensor, candidates_NC: Tensor) -> Tensor:
    """The nearest of each row's candidates, the lowest of equals."""
    row, code = candidates_NC.nonzero().T
    size = max(1, PAIRS // max(1, x_ND.shape[1]))
    pairs = zip(row.split(size), code.split(size), strict=True)
    distance = torch.cat([distances(x_ND[r], codes_CD[c]) for r, c in pairs])
    least = distance.new_full((len(x_ND),), torch.inf).scatter_reduce_(0, row, distance, "amin")
    nearest = distance == least[row]
    first = torch.full_like(row[: len(x_ND)], len(codes_CD))
    return first.scatter_reduce_(0, row[nearest], code[nearest], "amin")
