"""Block-sparse attention: bound by the keys that are read, N blocks of each query and group."""

from collections.abc import Iterator

import torch

from kernels import View, attention, block_sparse_attention, op
from kernels.bench import Bench, Case


def cases(bench: Bench) -> Iterator[Case]:
    """As NSA selects them: the first block, the two last, and others at random."""
    real = ((1, 16384, 64, 4, 128, 16, 64), (1, 65536, 64, 4, 128, 16, 64))
    shapes = real if bench.gpu else ((1, 2048, 4, 1, 32, 4, 16),)
    for rows, tokens, heads, groups, size, picks, block in shapes:
        peers = {"dense": _dense} if bench.gpu else {"dense": _dense, "loop": _loop(block)}
        yield _case(bench, rows, tokens, heads, groups, size, picks, block, peers, "")
    if not bench.gpu:
        for tokens in (4096, 32768):
            yield _case(bench, 1, tokens, 2, 1, 16, 2, 16, {}, "series")


def _case(bench, rows, tokens, heads, groups, size, picks, block, peers, series):
    def draw():
        last = (torch.arange(tokens, device=bench.device) // block)[:, None, None]
        random = (torch.rand(rows, tokens, groups, picks, device=bench.device) * (last + 1)).long()
        random[..., 0] = 0
        random[..., 1:2] = last
        if picks > 2:
            random[..., 2:3] = last - 1  # -1 is none
        return {
            "q": bench.randn(rows, tokens, heads, size),
            "k": bench.randn(rows, tokens, groups, size),
            "v": bench.randn(rows, tokens, groups, size),
            "blocks": random,
        }

    def run(q, k, v, blocks):
        return block_sparse_attention(q, View({"k": k, "v": v}, {}), blocks, block=block)

    read = rows * tokens * (groups * picks * block + heads) * 2 * size * bench.dtype.itemsize
    flops = 4 * rows * tokens * heads * size * picks * block
    shape = f"B{rows} T{tokens} H{heads} G{groups} K{size} N{picks}x{block}"
    return Case(shape, draw, run, flops, read, peers=peers, series=series, tokens=tokens, truth=tokens < 8192)


def _dense(q, k, v, blocks):
    return attention(q, View({"k": k, "v": v}, {}))


def _loop(block):
    def run(q, k, v, blocks):
        before, op.FORM = op.FORM, "reference"
        try:
            return block_sparse_attention(q, View({"k": k, "v": v}, {}), blocks, block=block)
        finally:
            op.FORM = before

    return run
