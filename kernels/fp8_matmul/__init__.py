"""Products of 8-bit floating-point matrices with scales."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.fp8_matmul.chunked import chunked
from kernels.fp8_matmul.reference import BLOCK, reference


def _fake(a_MK: Tensor, b_KN: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: str) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_KN.shape[1], dtype=getattr(torch, dtype))


_op = op.Op("fp8_matmul", reference, chunked, _fake, differentiable=False)


def fp8_matmul(
    a_MK: Tensor, b_KN: Tensor, scale_a: Tensor, scale_b: Tensor, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """y (M, N) = (scale_a a) (scale_b b), the scales spread over what they are of; no gradients.

    a (M, K) and b (K, N) float8_e4m3fn; on a GPU b is best the transpose of a weight (N, K). Scales, floating:
    scale_a () for all, (M, 1) for rows, (1 or M, k) for blocks of 128 columns, k = ceil(K / 128);
    scale_b () for all, (1, N) for columns, (k, 1 or N) or (k, ceil(N / 128)) for blocks.
    Sums in fp32; y in `dtype`: bfloat16, float16, float32 or float64.
    Raises ValueError or TypeError naming the argument.
    """
    name = "fp8_matmul"
    check.shape(name, "a_MK", a_MK, (None, None), "(M, K)")
    (rows, dim) = a_MK.shape
    check.shape(name, "b_KN", b_KN, (dim, None), f"(K={dim}, N), K from a_MK")
    size = b_KN.shape[1]
    blocks, wide = (-(-n // BLOCK) for n in (dim, size))
    allowed = {"scale_a": ((1, rows), (1, blocks)), "scale_b": ((1, blocks), (1, size, wide))}
    scales = []
    for label, scale in (("scale_a", scale_a), ("scale_b", scale_b)):
        if not isinstance(scale, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(scale).__name__}")
        check.floating(name, label, scale)
        check.device(name, label, scale, a_MK)
        scale = scale.view(1, 1) if scale.dim() == 0 else scale
        sizes = allowed[label]
        if scale.dim() != 2 or any(n not in fit for n, fit in zip(scale.shape, sizes, strict=True)):
            what = ", ".join(" or ".join(map(str, dict.fromkeys(fit))) for fit in sizes)
            raise ValueError(f"{name}: {label} must be () or ({what}), got shape {tuple(scale.shape)}")
        scales.append(scale)
    for label, value in (("a_MK", a_MK), ("b_KN", b_KN)):
        check.dtype(name, label, value, torch.float8_e4m3fn)
    check.device(name, "b_KN", b_KN, a_MK)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"{name}: dtype={dtype} must be bfloat16, float16, float32 or float64")
    return _op(a_MK, b_KN, *scales, str(dtype).removeprefix("torch."))
