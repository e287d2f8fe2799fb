"""Attention to selected blocks on a GPU: a program holds one token's heads of one group and walks its blocks.

Backward walks them again for dq. For dk and dv it turns the selection round: (block, query) pairs are sorted by block,
and a program holds one block and walks the queries that chose it, so that nothing is added in two places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.tiles import lined, padded, read, strides
from kernels.block_sparse_attention.chunked import grad as chunked_grad
from kernels.block_sparse_attention.places import once, places
from kernels.launch import launch, precision

SAVED = 1
LOG2E = tl.constexpr(1.4426950408889634)


def takes(q, k, v, *_) -> bool:
    """Sizes of up to 256 and groups of up to 64 heads."""
    return max(q.shape[3], v.shape[3]) <= 256 and q.shape[2] // k.shape[2] <= 64


def forward(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    length_B: Tensor | None,
    positions_BT: Tensor | None,
    segments_BT: Tensor | None,
    table_BN: Tensor | None,
    blocks_BTGN: Tensor,
    scale: float,
    block: int,
    linear: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, V), and lse (B, T, H) to base 2; with `linear` lse says nothing."""
    q, k, v = lined(q_BTHK), lined(k_BTGK), lined(v_BTGV)
    rows, tokens, heads, size = q.shape
    groups, size_v = k.shape[2], v.shape[3]
    y = q.new_empty(rows, tokens, heads, size_v)
    lse = q.new_empty(rows, tokens, heads, dtype=torch.float32)
    slots = pages = 0
    lines = (0,) * 6
    if past_k is not None:
        past_k, past_v = lined(past_k), lined(past_v)
        pages = 1 if table_BN is None else table_BN.shape[1]
        slots = past_k.shape[1] * pages
        table_BN = None if table_BN is None else table_BN.contiguous()
        lines = strides(past_k, past_v)
    launch(
        _forward, (rows * tokens * groups,),
        q, k, v, past_k, past_v, y, lse, *_where(positions_BT, segments_BT, blocks_BTGN), length_B, table_BN,
        tokens, groups, blocks_BTGN.shape[3], slots, pages, *strides(q, k, v), *lines, scale,
        *_sizes(q, k, v, block), 1 if past_k is None else past_k.shape[1], precision(q.dtype), linear,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return y, lse


def fake(q, k, v, *_):
    y = q.new_empty(*q.shape[:3], v.shape[3])
    return y, y.new_empty(q.shape[:3], dtype=torch.float32)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`, and with a past that itself."""
    q, k, v, past_k, _, _, positions_BT, segments_BT, _, blocks_BTGN, scale, block, linear = args
    if past_k is not None:
        return chunked_grad(args, outputs, grads, needs)
    q, k, v, dy = lined(q), lined(k), lined(v), lined(grads[0])
    lse = outputs[-1]
    rows, tokens = q.shape[:2]
    groups, count = k.shape[2], blocks_BTGN.shape[3]
    dq, dk, dv = (q.new_empty(x.shape) for x in (q, k, v))
    if needs[1] or needs[2]:
        dk, dv = dk.zero_(), dv.zero_()  # padding belongs to no block
    fall = torch.empty_like(lse)
    base, column, at, own, blocks = _where(positions_BT, segments_BT, blocks_BTGN)
    lines, sizes = (*strides(q, k, v), *dy.stride()[:3]), _sizes(q, k, v, block)
    launch(
        _backward_queries, (rows * tokens * groups,),
        q, k, v, dy, lse, fall, dq, base, column, at, own, blocks, tokens, groups, count, *lines, scale,
        *sizes, precision(q.dtype), linear, num_warps=4, num_stages=2,
    )  # fmt: skip
    if needs[1] or needs[2]:
        begins, chosen, query = _turned(base, at, own, blocks, tokens, block)
        launch(
            _backward_keys, (begins.shape[0] * groups * sizes[5],),
            q, k, v, dy, lse, fall, dk, dv, column, at, own, begins, chosen, query, chosen.numel(),
            tokens, groups, count, *lines, scale, *sizes, precision(q.dtype), linear,
            num_warps=8 if max(sizes[2:4]) > 128 else 4, num_stages=2,
        )  # fmt: skip
    return [x for x, need in zip((dq, dk, dv), needs, strict=False) if need]


def _where(positions: Tensor | None, segments: Tensor | None, blocks: Tensor) -> tuple[Tensor | None, ...]:
    """base, column, position and document of each token, None without documents; and the blocks, each once."""
    blocks = once(blocks).contiguous()
    if segments is None:
        return None, None, None, None, blocks
    where = places(positions, segments)
    return where.base_BT, where.column_BT, positions.contiguous(), segments.contiguous(), blocks


def _sizes(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[int, ...]:
    """K, V, each filled up, keys of a tile and tiles of a block, the block, heads of a group, and those filled up."""
    size, size_v, ratio = q.shape[3], v.shape[3], q.shape[2] // k.shape[2]
    large = max(padded(size), padded(size_v)) * q.element_size()
    tile = min(padded(block), 128 if large <= 128 else 64 if large <= 512 else 32)
    return size, size_v, padded(size), padded(size_v), tile, triton.cdiv(block, tile), block, ratio, padded(ratio)


def _turned(base, at, own, blocks, tokens, block) -> tuple[Tensor, Tensor, Tensor]:
    """(row, place) where each block begins (M, 2); all selected blocks, as numbers that sort by row, group and place;
    and the query that selected each, as token."""
    rows, _, groups, count = blocks.shape
    device = blocks.device
    row = torch.arange(rows, device=device)
    token = torch.arange(tokens, device=device)
    if base is None:
        first = torch.arange(0, tokens, block, device=device)
        begins = torch.stack([row.repeat_interleave(len(first)), first.repeat(rows)], 1)
        place, real = blocks * block, (blocks >= 0) & (blocks * block <= token[:, None, None])
    else:
        begins = ((at % block == 0) & (own >= 0)).nonzero()  # (row, column)
        begins = torch.stack([begins[:, 0], (base + at)[begins[:, 0], begins[:, 1]]], 1)
        place = base[..., None, None] + blocks * block
        real = (blocks >= 0) & (own >= 0)[..., None, None] & (blocks * block <= at[..., None, None])
    group = torch.arange(groups, device=device)[:, None]
    number = ((row[:, None, None, None] * groups + group) * tokens + place).masked_fill(~real, -1)
    chosen, order = number.flatten().sort(stable=True)
    return begins.contiguous(), chosen, order // (groups * count) % max(tokens, 1)


@triton.jit
def _head_lines(token, group, T, groups, RATIO: tl.constexpr, BR: tl.constexpr):
    """Heads of a group, which of them are, and where a (B, T, H) tensor has them."""
    part = tl.arange(0, BR)
    head = group * RATIO + part
    return head, part < RATIO, token * (groups * RATIO) + head


@triton.jit
def _keys(chosen, part, here, row, T, base, column, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Positions of the keys of a part of a block, which of them the query may read, and their columns."""
    within = part * TILE + tl.arange(0, TILE)
    key_at = chosen * BLOCK + within
    sees = (within < BLOCK) & (key_at >= 0) & (key_at <= here)
    place = key_at + base
    if column is not None:
        place = tl.load(column + row * T + place, mask=sees & (place >= 0) & (place < T), other=0)
    return key_at, sees, place


@triton.jit
def _find(base, at, own, row, token, T):
    """base and position of a token of a call without a past; -1 at padding, which is before every key."""
    start, here = token * 0, token
    if at is not None:
        start, here = tl.load(base + row * T + token), tl.load(at + row * T + token)
        here = tl.where(tl.load(own + row * T + token) >= 0, here, -1)
    return start, here


@triton.jit
def _tile(x, at, sees, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Lines at offsets `at`, zeros where not seen."""
    d = tl.arange(0, BLOCK)
    return tl.load(x + at[:, None] + d[None, :], mask=sees[:, None] & (d < SIZE)[None, :], other=0.0)


@triton.jit
def _forward(
    q, k, v, past_k, past_v, y, lse, base, column, at, own, blocks, length, table, T, groups, N, S, pages,
    q_b, q_t, q_h, k_b, k_t, k_g, v_b, v_t, v_g, a_b, a_s, a_g, b_b, b_s, b_g, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, RATIO: tl.constexpr, BR: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
    LINEAR: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, token, group = program // groups // T, program // groups % T, program % groups
    head, real, line = _head_lines(row * T + token, group, T, groups, RATIO, BR)
    start, here = _find(base, at, own, row, token, T)
    known = token * 0
    if past_k is not None:
        known = tl.load(length + row)
        if at is None:
            start, here = start - known, here + known
        else:
            known = tl.where(tl.load(own + row * T + token) == 0, known, 0)
    q_tile = read(q + row * q_b + token * q_t, head, head < (group + 1) * RATIO, q_h, K, BK, True)
    acc = tl.zeros((BR, BV), tl.float32)
    m = tl.full((BR,), -float("inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    for i in range(0, N * TILES):
        chosen = tl.load(blocks + program * N + i // TILES)
        key_at, sees, place = _keys(chosen, i % TILES, here, row, T, start, column, BLOCK, TILE)
        fresh = sees
        if past_k is not None:
            sees = sees & (key_at >= known - S)
            fresh = sees & (key_at >= known)
        k_tile = _tile(k + row * k_b + group * k_g, place * k_t, fresh, K, BK)
        v_tile = _tile(v + row * v_b + group * v_g, place * v_t, fresh, V, BV)
        if past_k is not None:
            old = sees & (key_at < known)
            slot, page = tl.maximum(key_at, 0) % S, row
            if table is not None:
                page = tl.load(table + row * pages + slot // PAGE, mask=old, other=0)
                slot = slot % PAGE
            k_old = _tile(past_k + group * a_g, page * a_b + slot * a_s, old, K, BK).to(k_tile.dtype)
            v_old = _tile(past_v + group * b_g, page * b_b + slot * b_s, old, V, BV).to(v_tile.dtype)
            k_tile = tl.where(old[:, None], k_old, k_tile)
            v_tile = tl.where(old[:, None], v_old, v_tile)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if LINEAR:  # keys that are not seen are zeros
            acc = tl.dot((s * scale).to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        else:
            s = tl.where(sees[None, :], s * (scale * LOG2E), -float("inf"))
            larger = tl.maximum(m, tl.max(s, 1))
            top = tl.where(larger == -float("inf"), 0.0, larger)
            p = tl.exp2(s - top[:, None])
            shrink = tl.exp2(m - top)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
            m = larger
    some = total > 0
    total = tl.where(some, total, 1.0)
    d = tl.arange(0, BV)
    y_tile = (acc / total[:, None]).to(y.dtype.element_ty)
    tl.store(y + line[:, None] * V + d[None, :], y_tile, mask=real[:, None] & (d < V)[None, :])
    tl.store(lse + line, tl.where(some, m + tl.log2(total), float("inf")), mask=real)


@triton.jit
def _backward_queries(
    q, k, v, dy, lse, fall, dq, base, column, at, own, blocks, T, groups, N,
    q_b, q_t, q_h, k_b, k_t, k_g, v_b, v_t, v_g, g_b, g_t, g_h, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, RATIO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    LINEAR: tl.constexpr,
):  # fmt: skip
    """First the mean of dy.v under the weights, then dq: read twice, the keys are in the cache the second time.

    LINEAR has no mean.
    """
    program = tl.program_id(0).to(tl.int64)
    row, token, group = program // groups // T, program // groups % T, program % groups
    head, real, line = _head_lines(row * T + token, group, T, groups, RATIO, BR)
    start, here = _find(base, at, own, row, token, T)
    q_tile = read(q + row * q_b + token * q_t, head, head < (group + 1) * RATIO, q_h, K, BK, True)
    g_tile = read(dy + row * g_b + token * g_t, head, head < (group + 1) * RATIO, g_h, V, BV, True)
    top = tl.load(lse + line, mask=real, other=float("inf"))
    acc = tl.zeros((BR, BK), tl.float32)
    mean, mass = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32)
    for again in tl.static_range(1 if LINEAR else 0, 2):
        for i in range(0, N * TILES):
            chosen = tl.load(blocks + program * N + i // TILES)
            _, sees, place = _keys(chosen, i % TILES, here, row, T, start, column, BLOCK, TILE)
            k_tile = _tile(k + row * k_b + group * k_g, place * k_t, sees, K, BK)
            v_tile = _tile(v + row * v_b + group * v_g, place * v_t, sees, V, BV)
            found = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
            if not LINEAR:
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
                p = tl.where(sees[None, :], tl.exp2(s - top[:, None]), 0.0)
                if again == 0:
                    mean += tl.sum(p * found, 1)
                    mass += tl.sum(p, 1)
                else:
                    found = p * (found - mean[:, None])
            if again == 1:
                acc = tl.dot(found.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
        if again == 0:
            mean = mean / tl.where(mass > 0, mass, 1.0)
    d = tl.arange(0, BK)
    dq_tile = (acc * scale).to(dq.dtype.element_ty)
    tl.store(dq + line[:, None] * K + d[None, :], dq_tile, mask=real[:, None] & (d < K)[None, :])
    tl.store(fall + line, mean, mask=real)


@triton.jit
def _search(sorted_, count, number):
    """How many of `count` sorted numbers are below `number`."""
    low, high = number * 0, number * 0 + count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(sorted_ + middle) < number
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _backward_keys(
    q, k, v, dy, lse, fall, dk, dv, column, at, own, begins, chosen, query, count, T, groups, N,
    q_b, q_t, q_h, k_b, k_t, k_g, v_b, v_t, v_g, g_b, g_t, g_h, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, RATIO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    LINEAR: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    entry, group, part = program // TILES // groups, program // TILES % groups, program % TILES
    row, place = tl.load(begins + entry * 2), tl.load(begins + entry * 2 + 1)
    number = (row * groups + group) * T + place
    begin = _search(chosen, count, number)
    end = _search(chosen, count, number + 1)
    within = part * TILE + tl.arange(0, TILE)
    there = place + within
    inside = (within < BLOCK) & (there < T)
    columns, key_at = there, there
    if column is not None:
        columns = tl.load(column + row * T + there, mask=inside, other=0)
        first = tl.load(column + row * T + place)
        inside = inside & (tl.load(own + row * T + columns) == tl.load(own + row * T + first))
        key_at = tl.load(at + row * T + columns)
    k_tile = _tile(k + row * k_b + group * k_g, columns * k_t, inside, K, BK)
    v_tile = _tile(v + row * v_b + group * v_g, columns * v_t, inside, V, BV)
    of_k, of_v = tl.zeros((TILE, BK), tl.float32), tl.zeros((TILE, BV), tl.float32)
    # A line is one head of one query: 4 queries of 16 heads, or 16 of 4, are 64 lines.
    LINES: tl.constexpr = 64
    EACH: tl.constexpr = LINES // RATIO
    line = tl.arange(0, LINES)
    head = group * RATIO + line % RATIO
    for i in range(begin, end, EACH):
        each = i + line // RATIO
        real = (each < end) & (line < EACH * RATIO)
        token = tl.load(query + each, mask=real, other=0)
        here = token
        if at is not None:
            here = tl.load(at + row * T + token)
        q_tile = _tile(q + row * q_b, token * q_t + head * q_h, real, K, BK)
        g_tile = _tile(dy + row * g_b, token * g_t + head * g_h, real, V, BV)
        place_of = (row * T + token) * (groups * RATIO) + head
        top = tl.load(lse + place_of, mask=real, other=float("inf"))
        mean = tl.load(fall + place_of, mask=real, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        found = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
        sees = inside[:, None] & (key_at[:, None] <= here[None, :])
        if LINEAR:
            p = tl.where(sees, s * scale, 0.0)
            found = tl.where(sees, found, 0.0)
        else:
            p = tl.where(sees, tl.exp2(s * (scale * LOG2E) - top[None, :]), 0.0)
            found = p * (found - mean[None, :])
        of_v = tl.dot(p.to(g_tile.dtype), g_tile, of_v, input_precision=PRECISION)
        of_k = tl.dot(found.to(q_tile.dtype), q_tile, of_k, input_precision=PRECISION)
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    place = (row * T + columns) * groups + group
    k_place, v_place = dk + place[:, None] * K + d[None, :], dv + place[:, None] * V + e[None, :]
    tl.store(k_place, (of_k * scale).to(dk.dtype.element_ty), mask=inside[:, None] & (d < K)[None, :])
    tl.store(v_place, of_v.to(dv.dtype.element_ty), mask=inside[:, None] & (e < V)[None, :])
