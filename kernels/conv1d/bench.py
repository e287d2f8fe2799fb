"""The short convolution: bound by memory, one tensor in and one out."""

from collections.abc import Iterator

import torch
from torch.nn.functional import conv1d as torch_conv1d
from torch.nn.functional import silu

from kernels import conv1d
from kernels.bench import Bench, Case
from kernels.conv1d.reference import reference

TAPS = 4


def cases(bench: Bench) -> Iterator[Case]:
    """With silu, as recurrences have it; backward reads x and the output's gradient and writes one tensor."""
    sizes = ((8, 4096, 4096),) if bench.gpu else ((1, 2048, 64), (1, 4096, 64), (1, 32768, 64))
    for rows, tokens, size in sizes:

        def inputs(rows=rows, tokens=tokens, size=size):
            return {"x_BTD": bench.randn(rows, tokens, size), "weight_DW": bench.randn(size, TAPS)}

        def loop(x_BTD, weight_DW):
            return reference(x_BTD, weight_DW, None, None, None, True, 0)[0]

        peers = {"torch": cudnn}
        if tokens == 2048:
            peers["loop"] = loop
        if bench.gpu:
            peers["torch.compile"] = torch.compile(cudnn)
        yield Case(
            f"B{rows} T{tokens} D{size} W{TAPS}", inputs, run, 2 * TAPS * rows * tokens * size,
            2 * rows * tokens * size * bench.dtype.itemsize, backward=1.5, peers=peers,
            series="tokens" if tokens != 2048 else "", tokens=tokens,
        )  # fmt: skip


def run(x_BTD, weight_DW):
    return conv1d(x_BTD, weight_DW, activation="silu")[0]


def cudnn(x_BTD, weight_DW):
    """torch's convolution, a group for each channel."""
    size, taps = weight_DW.shape
    y = torch_conv1d(x_BTD.transpose(1, 2), weight_DW[:, None], padding=taps - 1, groups=size)
    return silu(y[..., : x_BTD.shape[1]]).transpose(1, 2)
