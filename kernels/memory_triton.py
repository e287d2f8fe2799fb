"""A matrix memory on a GPU: the chunks of `kernels.memory`, whose docstring has the equations.

Forward is two kernels: `_scores`, all chunks at once, makes the products of pairs of tokens and solves the triangular
system; `_walk`, one program per head and block of value columns, keeps S on chip and goes from chunk to chunk. Backward
is `memory_triton_grad`: `unwalk`, the same in reverse, then `score_grads` and `key_grads`, all chunks at once.
Decays per channel and the triangular system go by levels, as `kernels.decays.ByChannel` does: runs of 1, 2, 4 ...
tokens meet their neighbours, each level a masked product of whole tiles.
`_steps` walks token by token: a decode step, and the last `keep` tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import memory_triton_grad as backward
from kernels import recurrence, segments
from kernels.chunks import STEPS
from kernels.launch import launch, precision
from kernels.memory import chunk as chunk_size
from kernels.memory_tiles import (
    FLOOR,
    between_tokens,
    chunk_decays,
    factors,
    gates,
    meeting,
    placed,
    product,
    readers,
    real_tokens,
    rows_of,
    same_document,
)


def empty(q: Tensor, v: Tensor, keep: int, reads: bool, plain: bool) -> tuple[Tensor, ...]:
    """What `run` returns, unwritten."""
    y, state = recurrence.empty(q, v, keep)
    rows, tokens, heads, size = q.shape
    if keep or tokens <= STEPS:
        return y, state, *(state.new_empty(0) for _ in range(4 if reads else 2))
    c = chunk_size(tokens, size)
    n = (tokens + c - 1) // c
    starts = state.new_empty(rows, heads, n, size, v.shape[3])
    scores = state.new_empty(rows, heads, n, (1 + reads) * (plain + reads), c, c)
    if not reads:
        return y, state, starts, scores
    u, solver = state.new_empty(rows, heads, n, c, v.shape[3]), state.new_empty(rows, heads, n, c, c)
    return y, state, starts, scores, u, solver


class Call:
    """Contiguous arguments, and what every kernel is told of them."""

    def __init__(self, q, k, v, decay, a, b, beta, state, segments_BT, scale, keep) -> None:
        self.rows, self.tokens, self.heads, self.size = q.shape
        self.values = v.shape[3]
        self.walked = self.tokens if self.tokens <= STEPS else keep
        if decay is None:
            decay = q.new_zeros(self.rows, self.tokens, self.heads, dtype=torch.float32)
        given = (q, k, v, decay, a, b, beta, state, segments_BT)
        given = [None if x is None else x.contiguous() for x in given]
        self.q, self.k, self.v, self.decay, self.a, self.b, self.beta, self.state, self.segments = given
        self.number = None if segments_BT is None else segments.filled(self.segments)
        self.scale, self.keep = scale, keep
        self.reads, self.plain = a is not None or beta is not None, beta is None
        self.inside = self.tokens - self.walked  # tokens that go by chunks
        self.chunk = chunk_size(self.inside, self.size)
        self.chunks = triton.cdiv(self.inside, self.chunk)
        self.programs = self.rows * self.heads
        self.wide_block = max(16, triton.next_power_of_2(self.size))
        self.block = min(32 if decay.dim() == 4 else 64, self.wide_block)  # fewer channels where each has factors
        self.blocks = triton.cdiv(self.size, self.block)
        wanted = 64 if self.wide_block <= 64 else 32
        if self.programs * triton.cdiv(self.values, wanted) < 128:  # few heads: narrower blocks, more programs
            wanted //= 2
        self.value_block = max(16, min(wanted, triton.next_power_of_2(self.values)))
        self.columns = triton.cdiv(self.values, self.value_block)
        self.warps = 4 if self.wide_block <= 64 and decay.dim() == 3 and self.plain else 8
        tile = self.chunk * self.wide_block * (2 + 2 * (a is not None)) * q.element_size()
        tile += self.chunk * (12 * self.wide_block * (decay.dim() == 4) + 8 * self.chunk)
        self.stages = 2 if tile <= 2**16 else 1  # chunks whose tiles are in shared memory at once

    @property
    def inputs(self) -> tuple:
        return self.q, self.k, self.v, self.decay, self.a, self.b, self.beta, self.segments, self.number

    @property
    def sizes(self) -> dict:
        return {
            "K": self.size, "V": self.values, "C": self.chunk, "BV": self.value_block,
            "CHANNEL": self.decay.dim() == 4, "PRECISION": precision(self.v.dtype),
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


def run(*args) -> tuple[Tensor, ...]:
    """As `memory.run`; kept for `grad`: the memories where chunks start, the scores, and where it is read, u and T."""
    c = Call(*args)
    y, after = recurrence.empty(c.q, c.v, c.keep)
    saved = [after.new_empty(0) for _ in range(4 if c.reads else 2)]
    last = c.state
    if c.inside:
        starts, scores, *more = made = list(empty(c.q[:, : c.inside], c.v[:, : c.inside], 0, c.reads, c.plain)[2:])
        u, solver = more or (None, None)
        launch(
            _scores, (c.chunks * c.programs,), *c.inputs, scores, solver, c.inside, c.tokens, c.heads, c.scale,
            BK=c.block, **c.sizes,
        )  # fmt: skip
        last = starts.new_empty(c.rows, c.heads, c.size, c.values) if c.walked else after
        launch(
            _walk, (c.programs, c.columns), *c.inputs, c.state, scores, solver, starts, u, y, last,
            c.inside, c.tokens, c.heads, c.scale, BK=c.wide_block, **c.sizes,
        )  # fmt: skip
        saved = saved if c.walked else made
    if c.walked or not c.tokens:
        launch(
            _steps, (c.programs, c.columns), *c.inputs, last, y, after, c.inside, c.tokens, c.heads, c.scale, c.keep,
            K=c.size, V=c.values, BV=c.value_block, BK=c.wide_block, CHANNEL=c.decay.dim() == 4, num_warps=c.warps,
        )  # fmt: skip
    return y, after, *saved


def grad(args, saved, grads) -> dict[str, Tensor]:
    """As `memory.grad`."""
    c = Call(*args)
    starts, scores, u, solver = (*saved, None, None)[:4]
    dy, dafter = (g.contiguous() for g in grads)
    ends = torch.empty_like(starts)
    dr = None if u is None else torch.empty_like(u)
    dv, dstate = torch.empty_like(c.v), starts.new_empty(c.rows, c.heads, c.size, c.values)
    sizes = (c.inside, c.tokens, c.heads, c.scale)
    launch(
        backward.unwalk, (c.programs, c.columns), *c.inputs, scores, solver, dy, dafter, ends, dr, dv, dstate,
        *sizes, BK=c.wide_block, **c.sizes,
    )  # fmt: skip
    by_head = c.decay.dim() == 3
    dscores = torch.empty_like(scores)
    dq, dk = torch.empty_like(c.q), torch.empty_like(c.k)
    da, db = (None if x is None else torch.empty_like(x) for x in (c.a, c.b))
    parts = (c.blocks + 1, c.rows, c.tokens, c.heads)  # sums over keys: one of each block of keys, and of the scores
    ddecay = starts.new_empty(parts) if by_head else torch.empty_like(c.decay)
    dbeta = None if c.beta is None else starts.new_empty(parts)
    launch(
        backward.score_grads, (c.chunks * c.programs,), *c.inputs, scores, dy, u, dr, dscores,
        ddecay[-1] if by_head else None, None if dbeta is None else dbeta[-1], *sizes, **c.sizes,
    )  # fmt: skip
    launch(
        backward.key_grads, (c.chunks * c.programs, c.blocks), *c.inputs, dscores, dy, u, dr, starts, ends,
        dq, dk, da, db, ddecay, dbeta, *sizes, BK=c.block, **c.sizes,
    )  # fmt: skip
    found = {"q": dq, "k": dk, "v": dv, "decay": ddecay.sum(0) if by_head else ddecay, "a": da, "b": db}
    found |= {"beta": None if dbeta is None else dbeta.sum(0), "state": dstate}
    names = ("q", "k", "v", "decay", "a", "b", "beta", "state")
    return {name: found[name].to(x.dtype) for name, x in zip(names, args, strict=False) if x is not None}


@triton.jit
def _scores(
    q, k, v, decay, a, b, beta, segments, number, scores, solver, N, T, H, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of a chunk, in this order, as far as there are such: q k, q b, a k, a b; and T = (1 - a b)^-1."""
    READS: tl.constexpr = solver is not None
    PLAIN: tl.constexpr = beta is None
    LAG: tl.constexpr = a is not None
    LEVELS: tl.constexpr = 6 if C == 64 else 5 if C == 32 else 4
    bh, chunk, t, here, row = placed(C, N, T, H)
    at_b, at_h = bh // H, bh % H
    real = real_tokens(segments, at_b, t, T, N)
    i = tl.arange(0, C)
    diagonal = i[:, None] == i[None, :]
    q_k = tl.zeros((C, C), tl.float32)
    q_b = tl.zeros((C, C), tl.float32)
    a_k = tl.zeros((C, C), tl.float32)
    a_b = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
        d = first + tl.arange(0, BK)
        query = rows_of(q, row, real, K, d)
        key = rows_of(k, row, real, K, d)
        if READS:
            asks, along = readers(k, a, b, beta, row, real, K, d)
        if CHANNEL:
            query = query.to(tl.float32)
            key = key.to(tl.float32)
            gate = gates(decay, segments, at_b, at_h, t, T, N, H, K, d)
            if PLAIN:
                q_k += tl.where(diagonal, tl.sum(query * key, 1)[:, None], 0.0)
            if READS:
                q_b += tl.where(diagonal, tl.sum(query * along, 1)[:, None], 0.0)
            for power in range(LEVELS):
                since, lag, until = factors(gate, 1 << power, C, LAG)
                meet = meeting(1 << power, C)
                if PLAIN:
                    early = tl.trans(key * until)
                    met = tl.dot(query * since, early, input_precision=PRECISION)
                    q_k += tl.where(meet, met, 0.0)
                    if READS:
                        met = tl.dot(asks * lag, early, input_precision=PRECISION)
                        a_k += tl.where(meet, met, 0.0)
                if READS:
                    early = tl.trans(along * until)
                    met = tl.dot(query * since, early, input_precision=PRECISION)
                    q_b += tl.where(meet, met, 0.0)
                    met = tl.dot(asks * lag, early, input_precision=PRECISION)
                    a_b += tl.where(meet, met, 0.0)
        else:
            if PLAIN:
                q_k += product(query, key, PRECISION)
            else:
                q_b += product(query, key, PRECISION)
                a_b += product(key, key, PRECISION)
    factor = tl.where(same_document(number, at_b, t, T, N, C), scale, 0.0)
    if not CHANNEL:
        between = between_tokens(decay, segments, at_b, at_h, t, T, N, H, C)
        factor *= between
        if READS:
            rate = tl.load(beta + row, mask=real, other=0.0).to(tl.float32)
            between *= tl.where(diagonal, 0.0, -rate[:, None])
            a_b *= between
    COUNT: tl.constexpr = 4 if PLAIN and READS else 2 if READS else 1
    out = scores + ((bh.to(tl.int64) * tl.cdiv(N, C) + chunk) * COUNT) * C * C + i[:, None] * C + i[None, :]
    if PLAIN:
        tl.store(out, q_k * factor)
    if READS:
        if number is not None:
            same = same_document(number, at_b, t, T, N, C)
            a_k = tl.where(same, a_k, 0.0)
            a_b = tl.where(same, a_b, 0.0)
        if PLAIN:
            tl.store(out + C * C, q_b * factor)
            tl.store(out + 2 * C * C, a_k)
            tl.store(out + 3 * C * C, a_b)
        else:
            tl.store(out, q_b * factor)
            tl.store(out + C * C, a_b)
        # Two runs solved alone are solved together by one correction: [1 0; -X 1]^-1 = [1 0; X 1] around their border.
        solved = tl.where(diagonal, 1.0, tl.where(meeting(1, C), a_b, 0.0))
        for power in range(1, LEVELS):
            border = tl.where(meeting(1 << power, C), a_b, 0.0)
            half = tl.dot(solved, border, input_precision=PRECISION)
            solved += tl.dot(half, solved, input_precision=PRECISION)
        at = solver + (bh.to(tl.int64) * tl.cdiv(N, C) + chunk) * C * C + i[:, None] * C + i[None, :]
        tl.store(at, solved)


@triton.jit
def _walk(
    q, k, v, decay, a, b, beta, segments, number, state, scores, solver, starts, u, y, last, N, T, H, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S of one head and block of value columns, from chunk to chunk."""
    READS: tl.constexpr = solver is not None
    PLAIN: tl.constexpr = beta is None
    LAG: tl.constexpr = a is not None
    COUNT: tl.constexpr = 4 if PLAIN and READS else 2 if READS else 1
    bh = tl.program_id(0)
    at_b, at_h = bh // H, bh % H
    chunks = tl.cdiv(N, C)
    d = tl.arange(0, BK)
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    tile = d[:, None] * V + e[None, :]
    held = (d < K)[:, None] & (e < V)[None, :]
    square = i[:, None] * C + i[None, :]
    memory = tl.zeros((BK, BV), tl.float32)
    if state is not None:
        memory += tl.load(state + bh.to(tl.int64) * K * V + tile, mask=held, other=0.0).to(tl.float32)
    for chunk in range(chunks):
        t = chunk * C + i
        here = t < N
        row = (at_b.to(tl.int64) * T + t) * H + at_h
        real = real_tokens(segments, at_b, t, T, N)
        n = bh.to(tl.int64) * chunks + chunk
        tl.store(starts + n * K * V + tile, memory, mask=held)
        since, lag, until, across = chunk_decays(
            decay, segments, number, at_b, at_h, chunk, t, T, N, H, d, K, C, CHANNEL, LAG
        )
        value = rows_of(v, row, real, V, e).to(tl.float32)
        query = rows_of(q, row, real, K, d).to(tl.float32) * since * scale
        found = tl.dot(query, memory, input_precision=PRECISION)
        at = scores + n * COUNT * C * C + square
        if READS:
            asks, along = readers(k, a, b, beta, row, real, K, d)
            answer = tl.dot(asks * lag, memory, input_precision=PRECISION)
            if PLAIN:
                answer += tl.dot(tl.load(at + 2 * C * C), value, input_precision=PRECISION)
            else:
                answer += tl.load(beta + row, mask=real, other=0.0).to(tl.float32)[:, None] * value
            answer = tl.dot(tl.load(solver + n * C * C + square), answer, input_precision=PRECISION)
            tl.store(u + (n * C + i)[:, None] * V + e[None, :], answer, mask=(e < V)[None, :])
            read = at
            if PLAIN:
                read = at + C * C
            found += tl.dot(tl.load(read), answer, input_precision=PRECISION)
            memory = memory * across[:, None]
            memory += tl.dot(tl.trans(along * until), answer, input_precision=PRECISION)
        else:
            memory = memory * across[:, None]
        if PLAIN:
            found += tl.dot(tl.load(at), value, input_precision=PRECISION)
            key = rows_of(k, row, real, K, d).to(tl.float32) * until
            memory += tl.dot(tl.trans(key), value, input_precision=PRECISION)
        found = tl.where(real[:, None], found, 0.0)
        to = y + row[:, None] * V + e[None, :]
        tl.store(to, found.to(y.dtype.element_ty), mask=here[:, None] & (e < V)[None, :])
    tl.store(last + bh.to(tl.int64) * K * V + tile, memory, mask=held)


@triton.jit
def _steps(
    q, k, v, decay, a, b, beta, segments, number, state, y, after, N, T, H, scale, KEEP,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHANNEL: tl.constexpr,
):  # fmt: skip
    """S of one head and block of value columns, from token N on, one by one; the last KEEP + 1 moments are written."""
    bh = tl.program_id(0)
    at_b, at_h = (bh // H).to(tl.int64), bh % H
    d = tl.arange(0, BK)
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    tile = d[:, None] * V + e[None, :]
    held = (d < K)[:, None] & (e < V)[None, :]
    memory = tl.zeros((BK, BV), tl.float32)
    if state is not None:
        memory += tl.load(state + bh.to(tl.int64) * K * V + tile, mask=held, other=0.0).to(tl.float32)
    for step in range(T + 1 - N):
        t = N + step + tl.zeros((1,), tl.int32)  # one element: the interpreter's scalars make no masks
        moment = (at_b * (KEEP + 1) + t - (T - KEEP)) * H + at_h
        tl.store(after + moment[:, None] * K * V + tile, memory, mask=held & (t >= T - KEEP)[:, None])
        here = t < T
        row = (at_b * T + t) * H + at_h
        real = here
        if segments is not None:
            real = tl.load(segments + at_b * T + t, mask=here, other=-1) >= 0
            now = tl.load(number + at_b * T + t, mask=here, other=0)
            past = tl.load(number + at_b * T + t - 1, mask=here & (t > 0), other=0)
            memory = tl.where((here & (now != past))[:, None], 0.0, memory)
        query = tl.load(q + row * K + d, mask=real & (d < K), other=0.0).to(tl.float32)
        key = tl.load(k + row * K + d, mask=real & (d < K), other=0.0).to(tl.float32)
        value = tl.load(v + row * V + e, mask=real & (e < V), other=0.0).to(tl.float32)
        if a is not None:
            asks = tl.load(a + row * K + d, mask=real & (d < K), other=0.0).to(tl.float32)
            along = tl.load(b + row * K + d, mask=real & (d < K), other=0.0).to(tl.float32)
            answer = tl.sum(asks[:, None] * memory, 0)
        if CHANNEL:
            gate = tl.load(decay + row * K + d, mask=real & (d < K), other=0.0).to(tl.float32)
            memory *= tl.exp(tl.maximum(gate, FLOOR))[:, None]
        else:
            gate = tl.load(decay + row, mask=real, other=0.0).to(tl.float32)
            memory *= tl.exp(tl.maximum(gate, FLOOR))[:, None]
        if beta is not None:
            rate = tl.load(beta + row, mask=real, other=0.0).to(tl.float32)
            value = rate * (value - tl.sum(key[:, None] * memory, 0))
        memory += key[:, None] * value[None, :]
        if a is not None:
            memory += along[:, None] * answer[None, :]
        found = tl.sum(query[:, None] * memory, 0) * scale
        found = tl.where(real, found, 0.0)
        tl.store(y + row * V + e, found.to(y.dtype.element_ty), mask=here & (e < V))
