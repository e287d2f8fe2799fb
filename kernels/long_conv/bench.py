"""Long convolution. Operations are those of three real transforms of twice the length, at 2.5 n log2 n each."""

import math
from collections.abc import Iterator

import torch

from kernels import long_conv
from kernels.bench import Bench, Case
from kernels.long_conv.reference import reference


def cases(bench: Bench) -> Iterator[Case]:
    """Filters as long as the sequences. The error check covers those lengths that the loop could do."""
    sizes = ((16, 2048, 2048), (4, 8192, 2048)) if bench.gpu else ((1, 2048, 32), (1, 4096, 32), (1, 32768, 32))
    for rows, tokens, size in sizes:

        def inputs(rows=rows, tokens=tokens, size=size):
            decay = torch.exp(-torch.arange(tokens, device=bench.device) * 8 / tokens)
            return {
                "x_BTD": bench.randn(rows, tokens, size),
                "filter_DL": (bench.randn(size, tokens) * decay).to(bench.dtype),
            }

        def loop(x_BTD, filter_DL):
            return reference(x_BTD, filter_DL, None)

        length = 2 * tokens
        yield Case(
            f"B{rows} T{tokens} D{size}", inputs, long_conv, 3 * 2.5 * rows * size * length * math.log2(length),
            (2 * rows + 1) * tokens * size * bench.dtype.itemsize, backward=2.0,
            peers={"torch.fft": fft} if bench.gpu else {"loop": loop} if tokens == 2048 else {},
            series="tokens" if tokens != 2048 else "", tokens=tokens,
        )  # fmt: skip


def fft(x_BTD, filter_DL):
    """The transforms of torch, cuFFT on a GPU, along time where it lies."""
    tokens = x_BTD.shape[1]
    spectrum = torch.fft.rfft(x_BTD.float(), 2 * tokens, dim=1) * torch.fft.rfft(filter_DL.float(), 2 * tokens).T
    return torch.fft.irfft(spectrum, 2 * tokens, dim=1)[:, :tokens].to(x_BTD.dtype)
