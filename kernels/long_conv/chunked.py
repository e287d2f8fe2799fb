"""Long convolution for CPUs: a product of Fourier transforms, padded so that the end does not wrap into the start."""

import torch
from torch import Tensor


def chunked(x_BTD: Tensor, filter_DL: Tensor, skip_D: Tensor | None) -> Tensor:
    """As `reference`."""
    x, weight = _wide(x_BTD, filter_DL)
    if x.numel() == 0:
        return torch.empty_like(x_BTD)
    tokens = x.shape[2]
    length = padded(tokens, weight.shape[1])
    y = torch.fft.irfft(torch.fft.rfft(x, length) * torch.fft.rfft(weight, length), length)[..., :tokens]
    y = y if skip_D is None else y + x * skip_D.to(x.dtype)[:, None]
    return y.to(x_BTD.dtype).transpose(1, 2)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """By the adjoint: products with conjugate transforms."""
    x_BTD, filter_DL, skip_D = args
    x, weight = _wide(x_BTD, filter_DL)
    if x.numel() == 0:
        return [torch.zeros_like(arg) for arg, need in zip(args, needs, strict=True) if need]
    g = grads[0].to(x.dtype).transpose(1, 2).contiguous()
    tokens = x.shape[2]
    length = padded(tokens, weight.shape[1])
    of_g = torch.fft.rfft(g, length)
    found = []
    if needs[0]:
        dx = torch.fft.irfft(of_g * torch.fft.rfft(weight, length).conj(), length)[..., :tokens]
        dx = dx if skip_D is None else dx + g * skip_D.to(x.dtype)[:, None]
        found.append(dx.transpose(1, 2).to(x_BTD.dtype))
    if needs[1]:
        both = (of_g * torch.fft.rfft(x, length).conj()).sum(0)
        dweight = torch.zeros_like(filter_DL)
        dweight[:, :tokens] = torch.fft.irfft(both, length)[:, : weight.shape[1]].to(filter_DL.dtype)
        found.append(dweight)
    if needs[2]:
        found.append((g * x).sum((0, 2)).to(skip_D.dtype))
    return found


def padded(tokens: int, taps: int) -> int:
    """A length that a fast transform likes and that holds all of the convolution: 2^n, 3 2^n or 5 2^n."""
    need = max(2, tokens + taps - 1)
    return min(k << max(0, -(-need // k) - 1).bit_length() for k in (1, 3, 5))


def _wide(x_BTD: Tensor, filter_DL: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, D, T) and the part of the filter that acts, in fp32 at least."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    return x_BTD.to(wide).transpose(1, 2).contiguous(), filter_DL[:, : x_BTD.shape[1]].to(wide)
