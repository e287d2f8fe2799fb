"""Vector quantisation: the nearest code, and codes of what codes before have left."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.nearest_code.chunked import chunked
from kernels.nearest_code.reference import reference


def _fake(x_ND: Tensor, codes_CD: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], dtype=torch.int64)


_op = op.Op("nearest_code", reference, chunked, _fake, differentiable=False)


def nearest_code(x_ND: Tensor, codes_CD: Tensor) -> Tensor:
    """The code of the smallest squared distance to each row: indices (N) int64; no gradients (arXiv 1711.00937).

    x (N, D) and codes (C, D), floating. The choice is that of differences in float64, the lowest index of equals,
    however near they are. Never holds N x C distances. Raises ValueError or TypeError naming the argument.
    """
    check.shape("nearest_code", "x_ND", x_ND, (None, None), "(N, D)")
    check.floating("nearest_code", "x_ND", x_ND)
    _codes("nearest_code", "codes_CD", codes_CD, x_ND, (None, x_ND.shape[1]), f"(C, D={x_ND.shape[1]})")
    return _op(x_ND.detach(), codes_CD.detach())


def residual_codes(x_ND: Tensor, codes_QCD: Tensor) -> tuple[Tensor, Tensor]:
    """Q codebooks one after the other, each for what those before have left (arXiv 2107.03312).

    x (N, D) and codes (Q, C, D), floating. Returns indices (N, Q) int64 and the sum of the codes chosen (N, D) in
    x.dtype, made in fp32 (fp64 for fp64); it has no gradient: straight-through is the caller's.
    Raises ValueError or TypeError naming the argument.
    """
    check.shape("residual_codes", "x_ND", x_ND, (None, None), "(N, D)")
    check.floating("residual_codes", "x_ND", x_ND)
    size = x_ND.shape[1]
    _codes("residual_codes", "codes_QCD", codes_QCD, x_ND, (None, None, size), f"(Q, C, D={size})")
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    left_ND, codes_QCD = x_ND.detach().to(wide), codes_QCD.detach()
    found = [torch.zeros(len(x_ND), 0, dtype=torch.int64, device=x_ND.device)]
    total_ND = torch.zeros_like(left_ND)
    for codes_CD in codes_QCD:
        index_N = _op(left_ND, codes_CD)
        code_ND = codes_CD.to(wide)[index_N]
        left_ND, total_ND = left_ND - code_ND, total_ND + code_ND
        found.append(index_N[:, None])
    return torch.cat(found, 1), total_ND.to(x_ND.dtype)


def _codes(name: str, label: str, codes: Tensor, x_ND: Tensor, want: tuple[int | None, ...], what: str) -> None:
    check.shape(name, label, codes, want, f"{what}, D from x_ND")
    check.floating(name, label, codes)
    check.device(name, label, codes, x_ND)
    if not codes.shape[-2]:
        raise ValueError(f"{name}: {label} must have at least one code")
