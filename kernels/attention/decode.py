"""Attention on a GPU with a past, contiguous or paged, read in as many pieces as fill the machine.

A program holds the queries of some tokens and all heads of a group, walks one piece of the past's slots and, in the
last piece, the call's own tokens; a second kernel merges the pieces ("Flash-Decoding", 2023). Slots hold what the
formula of `view` says. Key sizes that are no power of two, such as the 512 + 64 of latent attention, are read in two
parts, and where values are the first part of the keys' own memory they are not read a second time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.logits import logits
from kernels.attention.tiles import lined
from kernels.attention.view import ancestors
from kernels.launch import INTERPRETED, launch, precision

TREE = 64  # tokens of a draft tree: one bit each


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    length: Tensor | None,
    positions: Tensor | None,
    segments: Tensor | None,
    table: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    parents: Tensor | None,
    scale: float,
    window: int,
    causal: bool,
    softcap: float,
) -> Tensor:
    """y (B, T, H, V); arguments as `reference`."""
    q, k, v = lined(q), lined(k), lined(v)
    rows, tokens, heads, size = q.shape
    groups, size_v = k.shape[2], v.shape[3]
    ratio = heads // groups
    y = q.new_empty(rows, tokens, heads, size_v)
    slots = pages = 0
    shared = False
    if past_k is not None:
        first, second = parts(size)
        shared = past_v.data_ptr() == past_k.data_ptr() and past_v.stride() == past_k.stride() and size_v == first
        past_k, past_v = lined(past_k), lined(past_v)
        pages = 1 if table is None else table.shape[1]
        slots = past_k.shape[1] * pages
        table = None if table is None else table.contiguous()
    block_m, block_n, warps, stages = _tile(tokens * ratio, size, size_v, q.dtype)
    tiles = triton.cdiv(tokens * ratio, block_m)
    reach = min(slots, window + tokens) if window else slots
    pieces = _pieces(rows * groups * tiles, reach, block_n, q.device)
    if pieces > 1:
        part = q.new_empty(pieces, rows, tokens, heads, size_v, dtype=torch.float32)
        tops, totals = (q.new_empty(pieces, rows, tokens, heads, dtype=torch.float32) for _ in range(2))
    else:
        part, tops, totals = y, None, None
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    strides += (0,) * 6 if past_k is None else (*past_k.stride()[:3], *past_v.stride()[:3])
    positions, segments = (None if x is None else x.contiguous() for x in (positions, segments))
    slopes, sinks = (None if x is None else x.float().contiguous() for x in (slopes, sinks))
    launch(
        _piece, (rows * groups * tiles, pieces),
        q, k, v, past_k, past_v, part, tops, totals, length, positions, segments, table, slopes, sinks, _bits(parents),
        rows, tokens, groups, slots, pages, *strides, scale,
        size, size_v, *parts(size), max(16, triton.next_power_of_2(size_v)), block_m, block_n, ratio,
        1 if past_k is None else past_k.shape[1], window, causal, softcap, shared, precision(q.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if pieces > 1:
        lines, block = rows * tokens * heads, max(16, triton.next_power_of_2(size_v))
        at_once = max(1, 1024 // block)
        launch(_merge, (triton.cdiv(lines, at_once),), part, tops, totals, y, lines, pieces, size_v, block, at_once)
    return y


def parts(size: int) -> tuple[int, int]:
    """A size as a power of two and what covers the rest, 0 if nothing."""
    first = max(16, 1 << (size.bit_length() - 1))
    return first, 0 if size <= first else max(16, triton.next_power_of_2(size - first))


def _bits(parents: Tensor | None) -> Tensor | None:
    """Bit j of a token's number: it reads column j of the call."""
    if parents is None:
        return None
    columns = torch.arange(parents.shape[1], device=parents.device)
    return (ancestors(parents).long() << columns).sum(2)


def _tile(lines: int, size: int, size_v: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Query lines, keys, warps and stages: two stages of keys and values within 128 KB."""
    large = max(size, size_v)
    block_m = max(16, min(64 if large > 128 or dtype == torch.float32 else 128, triton.next_power_of_2(lines)))
    block_n = 64 if large <= 128 else 32
    if dtype == torch.float32:
        block_n = 32 if large <= 128 else 16
    warps = 8 if block_m * large >= 64 * 128 else 4
    return block_m, block_n, warps, 3 if large <= 128 and dtype != torch.float32 else 2


def _pieces(programs: int, reach: int, block_n: int, device: torch.device) -> int:
    """Pieces of the past, so that there are a few programs for each processor."""
    processors = 8 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(triton.cdiv(2 * processors, max(programs, 1)), reach // block_n, 256))


@triton.jit
def _wide(x, inside, at, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Lines at offsets `at` of SIZE channels, as (.., BLOCK), zeros where not `inside`."""
    d = tl.arange(0, BLOCK)
    if SIZE == BLOCK:
        return tl.load(x + at[:, None] + d[None, :], mask=inside[:, None], other=0.0)
    return tl.load(x + at[:, None] + d[None, :], mask=inside[:, None] & (d < SIZE)[None, :], other=0.0)


@triton.jit
def _step(
    acc, m, total, q_one, q_two, k, v, inside, k_line, v_line, near, sees, slope, scale,
    K: tl.constexpr, V: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr, BV: tl.constexpr, WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, SLOPED: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax over one more tile of keys."""
    if WINDOW:
        sees = sees & (near < WINDOW)
    k_one = _wide(k, inside, k_line, K if K < ONE else ONE, ONE).to(q_one.dtype)
    s = tl.dot(q_one, tl.trans(k_one), input_precision=PRECISION)
    if TWO:
        k_two = _wide(k + ONE, inside, k_line, K - ONE, TWO).to(q_one.dtype)
        s = tl.dot(q_two, tl.trans(k_two), s, input_precision=PRECISION)
    s, _ = logits(s, near, slope, scale, CAP, SLOPED, CAUSAL)
    s = tl.where(sees, s, -float("inf"))
    larger = tl.maximum(m, tl.max(s, 1))
    base = tl.where(larger == -float("inf"), 0.0, larger)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    total = total * shrink + tl.sum(p, 1)
    acc *= shrink[:, None]
    if SHARED:
        acc = tl.dot(p.to(q_one.dtype), k_one, acc, input_precision=PRECISION)
    else:
        v_tile = _wide(v, inside, v_line, V, BV).to(q_one.dtype)
        acc = tl.dot(p.to(q_one.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, larger, total


@triton.jit
def _piece(
    q, k, v, past_k, past_v, part, tops, totals, length, positions, segments, table, slopes, sinks, tree,
    rows, T, groups, S, pages, q_b, q_t, q_h, k_b, k_t, k_g, v_b, v_t, v_g, a_b, a_s, a_g, b_b, b_s, b_g, scale,
    K: tl.constexpr, V: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, RATIO: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    CAP: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T * RATIO, BM)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    line = tile * BM + tl.arange(0, BM)
    real = line < T * RATIO
    token, head = line // RATIO, group * RATIO + line % RATIO
    known = 0
    if length is not None:
        known = tl.load(length + row).to(tl.int32)
    at = token + known
    if positions is not None:
        at = tl.load(positions + row * T + token, mask=real, other=0).to(tl.int32)
    own = tl.where(real, 0, -1)
    if segments is not None:
        own = tl.load(segments + row * T + token, mask=real, other=-1).to(tl.int32)
    slope = tl.zeros((BM, 1), tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=real, other=0.0)[:, None]
    q_line = row * q_b + token.to(tl.int64) * q_t + head * q_h
    q_one = _wide(q, own >= 0, q_line, K if K < ONE else ONE, ONE)
    q_two = q_one
    if TWO:
        q_two = _wide(q + ONE, own >= 0, q_line, K - ONE, TWO)
    acc = tl.zeros((BM, BV), tl.float32)
    m = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if past_k is not None:
        # Slots in use; without a ring, those before the window of the first query are left out.
        end = tl.minimum(known, S)
        begin = end * 0
        if WINDOW:
            least = tl.min(tl.where(own == 0, at, 2147483647))
            begin = tl.where(known <= S, tl.minimum(tl.maximum(least - (WINDOW - 1), 0), end), 0)
        end = tl.where(tl.max(tl.where(own == 0, 1, 0)) > 0, end, begin)
        share = tl.cdiv(tl.cdiv(end - begin, pieces), BN) * BN
        begin += piece * share
        end = tl.minimum(end, begin + share)
        turn = (tl.maximum(known, 1) - 1) % S  # the slot written last
        for start in range(begin, end, BN):
            slot = start + tl.arange(0, BN)
            index = known - 1 - turn + slot - tl.where(slot > turn, S, 0)
            inside = (slot < end) & (index >= 0)
            if table is not None:
                page = tl.load(table + row * pages + slot // PAGE, mask=inside, other=0)
                k_line = page * a_b + (slot % PAGE).to(tl.int64) * a_s + group * a_g
                v_line = page * b_b + (slot % PAGE).to(tl.int64) * b_s + group * b_g
            else:
                k_line = row * a_b + slot.to(tl.int64) * a_s + group * a_g
                v_line = row * b_b + slot.to(tl.int64) * b_s + group * b_g
            near = at[:, None] - index[None, :]
            sees = inside[None, :] & (own == 0)[:, None]
            acc, m, total = _step(
                acc, m, total, q_one, q_two, past_k, past_v, inside, k_line, v_line, near, sees, slope, scale,
                K, V, ONE, TWO, BV, WINDOW, CAUSAL, CAP, slopes is not None, SHARED, PRECISION,
            )  # fmt: skip
    if piece == pieces - 1:
        stop = T
        if CAUSAL:
            stop = tl.minimum(T, (tile * BM + BM - 1) // RATIO + 1)
        for start in range(0, stop, BN):
            column = start + tl.arange(0, BN)
            inside = column < T
            there = column + known
            if positions is not None:
                there = tl.load(positions + row * T + column, mask=inside, other=0).to(tl.int32)
            theirs = tl.where(inside, 0, -1)
            if segments is not None:
                theirs = tl.load(segments + row * T + column, mask=inside, other=-1).to(tl.int32)
            inside = theirs >= 0
            sees = (own[:, None] == theirs[None, :]) & inside[None, :]
            if CAUSAL:
                sees = sees & (column[None, :] <= token[:, None])
            if tree is not None:
                bits = tl.load(tree + row * T + token, mask=real, other=0)
                sees = sees & (((bits[:, None] >> column[None, :].to(tl.int64)) & 1) != 0)
            k_line = row * k_b + column.to(tl.int64) * k_t + group * k_g
            v_line = row * v_b + column.to(tl.int64) * v_t + group * v_g
            acc, m, total = _step(
                acc, m, total, q_one, q_two, k, v, inside, k_line, v_line, at[:, None] - there[None, :], sees, slope,
                scale, K, V, ONE, TWO, BV, WINDOW, CAUSAL, CAP, slopes is not None, False, PRECISION,
            )  # fmt: skip
        if sinks is not None:
            sink = tl.load(sinks + head, mask=real, other=0.0) * 1.4426950408889634
            larger = tl.maximum(m, sink)
            shrink = tl.exp2(m - larger)
            total = total * shrink + tl.exp2(sink - larger)
            acc *= shrink[:, None]
            m = larger
    place = (row * T + token) * (groups * RATIO) + head
    d = tl.arange(0, BV)
    if tops is not None:
        place += piece.to(tl.int64) * rows * T * groups * RATIO
        tl.store(tops + place, m, mask=real)
        tl.store(totals + place, total, mask=real)
    else:
        acc /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        part + place[:, None] * V + d[None, :], acc.to(part.dtype.element_ty), mask=real[:, None] & (d < V)[None, :]
    )


@triton.jit
def _merge(part, tops, totals, y, lines, pieces, V: tl.constexpr, BV: tl.constexpr, LINES: tl.constexpr):
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    real = line < lines
    d = tl.arange(0, BV)
    inside = real[:, None] & (d < V)[None, :]
    acc = tl.zeros((LINES, BV), tl.float32)
    m = tl.full((LINES,), -float("inf"), tl.float32)
    total = tl.zeros((LINES,), tl.float32)
    for piece in range(pieces):
        at = line + piece * lines
        top = tl.load(tops + at, mask=real, other=-float("inf"))
        larger = tl.maximum(m, top)
        base = tl.where(larger == -float("inf"), 0.0, larger)
        shrink, weight = tl.exp2(m - base), tl.exp2(top - base)
        total = total * shrink + weight * tl.load(totals + at, mask=real, other=0.0)
        found = tl.load(part + at[:, None] * V + d[None, :], mask=inside, other=0.0)
        acc = acc * shrink[:, None] + weight[:, None] * found
        m = larger
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(y + line[:, None] * V + d[None, :], acc.to(y.dtype.element_ty), mask=inside)
