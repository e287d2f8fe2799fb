"""The gradient of `flash`: the weights again from lse, once per tile of queries and once per tile of keys.

The second goes over all query heads of its group, so that no two programs write to one place (arXiv 2307.08691).
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
    queries_of,
    read,
    schedule,
    section,
    strides,
    turn,
    visible,
)
from kernels.launch import launch, precision


def grad(
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
    lse: Tensor,
    fall: Tensor | None,
    dy: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv in `dtype`, fall (B, H, T), and the gradient of each query's slope (B, H, T), or None.

    fall: the sum of weights times their gradients, which is sum(dy * y), as `delta` has it. None: formed here from the
    weights themselves, at the price of two more products. That is for fp32, where a rounded y would show.
    """
    rows, tokens, heads, size = q.shape
    keys, groups, size_v = k.shape[1], k.shape[2], v.shape[3]
    dq = q.new_empty(rows, tokens, heads, size, dtype=dtype)
    dk = q.new_empty(rows, keys, groups, size, dtype=dtype)
    dv = q.new_empty(rows, keys, groups, size_v, dtype=dtype)
    dslope = None if slopes is None else torch.empty_like(lse)
    pairs, ratio = rows * heads, heads // groups
    lines = (*strides(q, k, v), *dy.stride()[:3])
    places, slopes = expanded(places, rows), floats(slopes)
    where = (places.q_at, places.k_at, places.q_in, places.k_in)
    sizes = (size, size_v, padded(size), padded(size_v))
    exact = fall is None
    fall = torch.empty_like(lse) if fall is None else fall
    for_keys, for_queries = _backward_tiles(size, size_v, q.dtype)
    block_m, block_n, warps, stages = for_queries
    ranges = schedule(places, tokens, keys, block_m, block_n, window, causal)
    launch(
        _backward_queries, (triton.cdiv(tokens, block_m) * pairs,),
        q, k, v, dy, lse, fall, dq, dslope, *where, ranges, slopes, floats(sinks),
        tokens, keys, heads, pairs, section(k, v, ratio, pairs), *lines, scale,
        *sizes, block_m, block_n, ratio, window, causal, softcap, precision(q.dtype), exact,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_m, block_n, warps, stages = for_keys
    ranges = schedule(places, tokens, keys, block_m, block_n, window, causal, of_keys=True)
    launch(
        _backward_keys, (triton.cdiv(keys, block_n) * rows * groups,),
        q, k, v, dy, lse, fall, dk, dv, *where, ranges, slopes,
        tokens, keys, groups, rows * groups, max(1, section(q, dy, 1, pairs) // ratio), *lines, scale,
        *sizes, block_m, block_n, ratio, window, causal, softcap, precision(q.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv, fall, dslope


def delta(y: Tensor, dy: Tensor) -> Tensor:
    """sum(dy * y) over the last dimension, (B, T, H, V) -> (B, H, T)."""
    rows, tokens, heads, size = y.shape
    found = y.new_empty(rows, heads, tokens, dtype=torch.float32)
    block = padded(size)
    lines = max(1, 4096 // block)
    grid = (triton.cdiv(rows * tokens * heads, lines),)
    launch(_delta, grid, y, dy, found, rows * tokens * heads, tokens, heads, *dy.stride()[:3], size, block, lines)
    return found


def _backward_tiles(size: int, size_v: int, dtype: torch.dtype) -> tuple[tuple, tuple]:
    """(queries, keys, warps, stages) of the kernel for dk and dv, and of that for dq."""
    large = max(padded(size), padded(size_v))
    if dtype == torch.float32:
        return ((32, 64, 4, 2), (64, 32, 4, 2)) if large <= 128 else ((16, 32, 4, 2), (32, 16, 4, 2))
    if large <= 64:
        return (64, 128, 8, 3), (128, 64, 8, 3)
    return ((32, 128, 8, 2), (128, 64, 8, 2)) if large <= 128 else ((32, 64, 8, 2), (64, 32, 8, 2))


@triton.jit
def _backward_queries(
    q, k, v, dy, lse, delta, dq, dslope, q_at, k_at, q_in, k_in, schedule, slopes, sinks,
    T, S, heads, pairs, section,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, g_b, g_t, g_h, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RATIO: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BM)
    pair, tile = turn(pairs, tiles, section)
    if CAUSAL:
        tile = tiles - 1 - tile
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q, k, v = q + row * q_b + head * q_h, k + row * k_b + head // RATIO * k_g, v + row * v_b + head // RATIO * v_g
    if q_at is not None:
        q_at += row * T
        k_at += row * S
    if q_in is not None:
        q_in += row * T
        k_in += row * S
    lse += pair.to(tl.int64) * T
    delta += pair.to(tl.int64) * T
    columns = tile * BM + tl.arange(0, BM)
    at, inside = find(q_at, q_in, columns, T)
    q_tile = read(q, columns, inside >= 0, q_t, K, BK, True)
    g_tile = read(dy + row * g_b + head * g_h, columns, inside >= 0, g_t, V, BV, True)
    base = _base(lse, columns, T)
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head)
    acc = tl.zeros((BM, BK), tl.float32)
    fall, mass, side = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    first, whole, cut, last = keys_of(schedule, row, tile, T, S, BM, BN, WINDOW, CAUSAL)
    if EXACT:
        if sinks is not None:
            mass = tl.exp2(tl.load(sinks + head) * 1.4426950408889634 - base)
        acc, fall, mass = _to_queries(
            acc, fall, mass, q_tile, g_tile, base, fall, k, v, k_at, k_in, at, inside, slope, first, last,
            S, k_s, v_s, scale, K, V, BK, BV, BN, WINDOW, CAUSAL, CAP, slopes is not None, PRECISION, True, True,
        )  # fmt: skip
        # Rounding of lse makes weights that do not add up to 1; taking their mean dy.v makes up for it.
        fall = fall / tl.where(mass > 0, mass, 1.0)
        tl.store(delta + columns, fall, mask=columns < T)
    else:
        fall = tl.load(delta + columns, mask=columns < T, other=0.0)
    if WINDOW or schedule is not None:
        acc, side, mass = _to_queries(
            acc, side, mass, q_tile, g_tile, base, fall, k, v, k_at, k_in, at, inside, slope, first, whole,
            S, k_s, v_s, scale, K, V, BK, BV, BN, WINDOW, CAUSAL, CAP, slopes is not None, PRECISION, True, False,
        )  # fmt: skip
    acc, side, mass = _to_queries(
        acc, side, mass, q_tile, g_tile, base, fall, k, v, k_at, k_in, at, inside, slope, whole, cut,
        S, k_s, v_s, scale, K, V, BK, BV, BN, WINDOW, CAUSAL, CAP, slopes is not None, PRECISION, False, False,
    )  # fmt: skip
    acc, side, mass = _to_queries(
        acc, side, mass, q_tile, g_tile, base, fall, k, v, k_at, k_in, at, inside, slope, cut, last,
        S, k_s, v_s, scale, K, V, BK, BV, BN, WINDOW, CAUSAL, CAP, slopes is not None, PRECISION, True, False,
    )  # fmt: skip
    d = tl.arange(0, BK)
    place = dq + ((row * T + columns) * heads + head)[:, None] * K + d[None, :]
    tl.store(place, (acc * scale).to(dq.dtype.element_ty), mask=(columns < T)[:, None] & (d < K)[None, :])
    if dslope is not None:
        tl.store(dslope + pair.to(tl.int64) * T + columns, side, mask=columns < T)


@triton.jit
def _base(lse, columns, T):
    """lse of queries; of one that sees nothing such that its weights are 0."""
    found = tl.load(lse + columns, mask=columns < T, other=float("inf"))
    return tl.where(found == -float("inf"), float("inf"), found)


@triton.jit
def _to_queries(
    acc, side, mass, q_tile, g_tile, base, fall, k, v, k_at, k_in, at, inside, slope, begin, end, S, k_s, v_s, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, SLOPED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    FALL: tl.constexpr,
):  # fmt: skip
    """What tiles of keys add to dq, and beside it to the slope's gradient; or if FALL to fall and mass."""
    for tile in range(begin, end):
        columns = tile * BN + tl.arange(0, BN)
        near, real = columns, columns
        if MASKED or SLOPED:
            other, theirs = find(k_at, k_in, columns, S)
            near, real = at[:, None] - other[None, :], theirs >= 0
        k_tile = read(k, columns, real, k_s, K, BK, MASKED)
        v_tile = read(v, columns, real, v_s, V, BV, MASKED)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s, bend = logits(s, near, slope, scale, CAP, SLOPED, CAUSAL)
        p = tl.exp2(s - base[:, None])
        if MASKED:
            p = tl.where(visible(near, inside[:, None], theirs[None, :], WINDOW, CAUSAL), p, 0.0)
        found = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        if FALL:
            side += tl.sum(p * found, 1)
            mass += tl.sum(p, 1)
        else:
            found = p * (found - fall[:, None])
            if SLOPED:
                side -= tl.sum(found * tl.abs(near).to(tl.float32), 1)
            if CAP > 0:
                found *= bend
            acc = tl.dot(found.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    return acc, side, mass


@triton.jit
def _backward_keys(
    q, k, v, dy, lse, delta, dk, dv, q_at, k_at, q_in, k_in, schedule, slopes, T, S, groups, pairs, section,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, g_b, g_t, g_h, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RATIO: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair, tile = turn(pairs, tl.cdiv(S, BN), section)
    row, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    if q_at is not None:
        q_at += row * T
        k_at += row * S
    if q_in is not None:
        q_in += row * T
        k_in += row * S
    columns = tile * BN + tl.arange(0, BN)
    at, inside = find(k_at, k_in, columns, S)
    k_tile = read(k + row * k_b + group * k_g, columns, inside >= 0, k_s, K, BK, True)
    v_tile = read(v + row * v_b + group * v_g, columns, inside >= 0, v_s, V, BV, True)
    of_k, of_v = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BV), tl.float32)
    first, whole, cut, last = queries_of(schedule, row, tile, T, S, BM, BN, WINDOW, CAUSAL)
    for i in range(RATIO):
        head = group * RATIO + i
        q_head, g_head = q + row * q_b + head * q_h, dy + row * g_b + head * g_h
        line = (row * groups * RATIO + head) * T
        lse_head, delta_head = lse + line, delta + line
        slope = 0.0
        if slopes is not None:
            slope = tl.load(slopes + head)
        of_k, of_v = _to_keys(
            of_k, of_v, k_tile, v_tile, q_head, g_head, lse_head, delta_head, q_at, q_in, at, inside, slope,
            first, whole, T, q_t, g_t, scale,
            K, V, BK, BV, BM, WINDOW, CAUSAL, CAP, slopes is not None, PRECISION, True,
        )  # fmt: skip
        of_k, of_v = _to_keys(
            of_k, of_v, k_tile, v_tile, q_head, g_head, lse_head, delta_head, q_at, q_in, at, inside, slope,
            whole, cut, T, q_t, g_t, scale,
            K, V, BK, BV, BM, WINDOW, CAUSAL, CAP, slopes is not None, PRECISION, False,
        )  # fmt: skip
        of_k, of_v = _to_keys(
            of_k, of_v, k_tile, v_tile, q_head, g_head, lse_head, delta_head, q_at, q_in, at, inside, slope,
            cut, last, T, q_t, g_t, scale,
            K, V, BK, BV, BM, WINDOW, CAUSAL, CAP, slopes is not None, PRECISION, True,
        )  # fmt: skip
    place = (row * S + columns) * groups + group
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    real = (columns < S)[:, None]
    k_place, v_place = dk + place[:, None] * K + d[None, :], dv + place[:, None] * V + e[None, :]
    tl.store(k_place, (of_k * scale).to(dk.dtype.element_ty), mask=real & (d < K)[None, :])
    tl.store(v_place, of_v.to(dv.dtype.element_ty), mask=real & (e < V)[None, :])


@triton.jit
def _to_keys(
    of_k, of_v, k_tile, v_tile, q, dy, lse, delta, q_at, q_in, at, inside, slope, begin, end, T, q_t, g_t, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, SLOPED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for tile in range(begin, end):
        columns = tile * BM + tl.arange(0, BM)
        near, real = columns, columns
        if MASKED or SLOPED:
            other, theirs = find(q_at, q_in, columns, T)
            near, real = other[None, :] - at[:, None], theirs >= 0
        q_tile = read(q, columns, real, q_t, K, BK, MASKED)
        g_tile = read(dy, columns, real, g_t, V, BV, MASKED)
        base, fall = _base(lse, columns, T), tl.load(delta + columns, mask=columns < T, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        s, bend = logits(s, near, slope, scale, CAP, SLOPED, CAUSAL)
        p = tl.exp2(s - base[None, :])
        if MASKED:
            p = tl.where(visible(near, theirs[None, :], inside[:, None], WINDOW, CAUSAL), p, 0.0)
        of_v = tl.dot(p.to(g_tile.dtype), g_tile, of_v, input_precision=PRECISION)
        found = p * (tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION) - fall[None, :])
        if CAP > 0:
            found *= bend
        of_k = tl.dot(found.to(q_tile.dtype), q_tile, of_k, input_precision=PRECISION)
    return of_k, of_v


@triton.jit
def _delta(y, dy, found, count, T, heads, g_b, g_t, g_h, SIZE: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr):
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    d = tl.arange(0, BLOCK)
    inside = (line < count)[:, None] & (d < SIZE)[None, :]
    head, token, row = line % heads, line // heads % T, line // heads // T
    g_line = row * g_b + token * g_t + head * g_h
    a = tl.load(y + line[:, None] * SIZE + d[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(dy + g_line[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(found + (row * heads + head) * T + token, tl.sum(a * b, 1), mask=line < count)
