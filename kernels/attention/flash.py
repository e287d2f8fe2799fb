"""Attention on a GPU where all keys stand in one tensor, forward: softmax on the way, a tile of keys at a time.

arXiv 2205.14135, 2307.08691. Beside y it gives lse, the logarithm to base 2 of each query's sum of weights, from which
backward forms the weights again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.logits import logits
from kernels.attention.tiles import (
    Places,
    expanded,
    find,
    floats,
    keys_of,
    padded,
    read,
    schedule,
    section,
    strides,
    turn,
    visible,
)
from kernels.launch import launch, precision


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    causal: bool,
    softcap: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, V) in `dtype` and lse (B, H, T) to base 2; inputs as `lined` makes them."""
    rows, tokens, heads, size = q.shape
    keys, groups, size_v = k.shape[1], k.shape[2], v.shape[3]
    places = expanded(places, rows)
    y = q.new_empty(rows, tokens, heads, size_v, dtype=dtype)
    lse = q.new_empty(rows, heads, tokens, dtype=torch.float32)
    block_m, block_n, warps, stages = _forward_tile(size, size_v, q.dtype)
    ranges = schedule(places, tokens, keys, block_m, block_n, window, causal)
    where = (places.q_at, places.k_at, places.q_in, places.k_in)
    pairs, ratio = rows * heads, heads // groups
    launch(
        _forward, (triton.cdiv(tokens, block_m) * pairs,),
        q, k, v, y, lse, *where, ranges, floats(slopes), floats(sinks),
        tokens, keys, heads, pairs, section(k, v, ratio, pairs), *strides(q, k, v), scale,
        size, size_v, padded(size), padded(size_v), block_m, block_n, ratio, window, causal, softcap,
        precision(q.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y, lse


def _forward_tile(size: int, size_v: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages: at most 160 registers of a thread in sums and logits, 200 KB on chip."""
    large = max(padded(size), padded(size_v))
    if dtype == torch.float32:
        return (64, 64, 4, 2) if large <= 64 else (64, 32, 4, 2)
    if large <= 64:
        return 128, 128, 8, 3
    return (128, 128, 8, 2) if large <= 128 else (128, 64, 8, 2)


@triton.jit
def _forward(
    q, k, v, y, lse, q_at, k_at, q_in, k_in, schedule, slopes, sinks, T, S, heads, pairs, section,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RATIO: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BM)
    pair, tile = turn(pairs, tiles, section)
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q, k, v = q + row * q_b + head * q_h, k + row * k_b + head // RATIO * k_g, v + row * v_b + head // RATIO * v_g
    if q_at is not None:
        q_at += row * T
        k_at += row * S
    if q_in is not None:
        q_in += row * T
        k_in += row * S
    columns = tile * BM + tl.arange(0, BM)
    at, inside = find(q_at, q_in, columns, T)
    q_tile = read(q, columns, inside >= 0, q_t, K, BK, True)
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head)
    m = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if sinks is not None:
        m = tl.zeros((BM,), tl.float32) + tl.load(sinks + head) * 1.4426950408889634
        total += 1.0
    acc = tl.zeros((BM, BV), tl.float32)
    first, whole, cut, last = keys_of(schedule, row, tile, T, S, BM, BN, WINDOW, CAUSAL)
    if WINDOW or schedule is not None:
        acc, m, total = _gather(
            acc, m, total, q_tile, k, v, k_at, k_in, at, inside, slope, first, whole, S, k_s, v_s, scale,
            K, V, BK, BV, BN, WINDOW, CAUSAL, CAP, slopes is not None, PRECISION, True,
        )  # fmt: skip
    acc, m, total = _gather(
        acc, m, total, q_tile, k, v, k_at, k_in, at, inside, slope, whole, cut, S, k_s, v_s, scale,
        K, V, BK, BV, BN, WINDOW, CAUSAL, CAP, slopes is not None, PRECISION, False,
    )  # fmt: skip
    acc, m, total = _gather(
        acc, m, total, q_tile, k, v, k_at, k_in, at, inside, slope, cut, last, S, k_s, v_s, scale,
        K, V, BK, BV, BN, WINDOW, CAUSAL, CAP, slopes is not None, PRECISION, True,
    )  # fmt: skip
    d = tl.arange(0, BV)
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    place = y + ((row * T + columns) * heads + head)[:, None] * V + d[None, :]
    tl.store(place, acc.to(y.dtype.element_ty), mask=(columns < T)[:, None] & (d < V)[None, :])
    found = tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), -float("inf"))
    tl.store(lse + pair.to(tl.int64) * T + columns, found, mask=columns < T)


@triton.jit
def _gather(
    acc, m, total, q_tile, k, v, k_at, k_in, at, inside, slope, begin, end, S, k_s, v_s, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, SLOPED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for tile in range(begin, end):
        columns = tile * BN + tl.arange(0, BN)
        near, real = columns, columns
        if MASKED or SLOPED:
            other, theirs = find(k_at, k_in, columns, S)
            near, real = at[:, None] - other[None, :], theirs >= 0
        k_tile = read(k, columns, real, k_s, K, BK, MASKED)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s, _ = logits(s, near, slope, scale, CAP, SLOPED, CAUSAL)
        if MASKED:
            s = tl.where(visible(near, inside[:, None], theirs[None, :], WINDOW, CAUSAL), s, -float("inf"))
        larger = tl.maximum(m, tl.max(s, 1))
        base = larger
        if MASKED:
            base = tl.where(larger == -float("inf"), 0.0, larger)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        total = total * shrink + tl.sum(p, 1)
        v_tile = read(v, columns, real, v_s, V, BV, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        m = larger
    return acc, m, total
