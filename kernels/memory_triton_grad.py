"""The backward kernels of `kernels.memory_triton`; `kernels.memory.grad` has the equations."""

import triton
import triton.language as tl

from kernels.memory_tiles import (
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
    run_sums,
    same_document,
)


@triton.jit
def unwalk(
    q, k, v, decay, a, b, beta, segments, number, scores, solver, dy, dafter, ends, dr, dv, dstate, N, T, H, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of S, from the last chunk to the first; on the way that of v, and of r, what is asked."""
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
    square = i[None, :] * C + i[:, None]  # a transposed score
    memory = tl.load(dafter + bh.to(tl.int64) * K * V + tile, mask=held, other=0.0).to(tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * C + i
        here = t < N
        row = (at_b.to(tl.int64) * T + t) * H + at_h
        real = real_tokens(segments, at_b, t, T, N)
        n = bh.to(tl.int64) * chunks + chunk
        tl.store(ends + n * K * V + tile, memory, mask=held)
        since, lag, until, across = chunk_decays(
            decay, segments, number, at_b, at_h, chunk, t, T, N, H, d, K, C, CHANNEL, LAG
        )
        given = rows_of(dy, row, real, V, e).to(tl.float32)
        at = scores + n * COUNT * C * C + square
        value = tl.zeros((C, BV), tl.float32)
        if PLAIN:
            key = rows_of(k, row, real, K, d).to(tl.float32) * until
            value += tl.dot(key, memory, input_precision=PRECISION)
            value += tl.dot(tl.load(at), given, input_precision=PRECISION)
        query = rows_of(q, row, real, K, d).to(tl.float32) * since * scale
        before = memory * across[:, None]
        before += tl.dot(tl.trans(query), given, input_precision=PRECISION)
        if READS:
            asks, along = readers(k, a, b, beta, row, real, K, d)
            answer = tl.dot(along * until, memory, input_precision=PRECISION)
            read = at
            if PLAIN:
                read = at + C * C
            answer += tl.dot(tl.load(read), given, input_precision=PRECISION)
            answer = tl.dot(tl.load(solver + n * C * C + square), answer, input_precision=PRECISION)
            tl.store(dr + (n * C + i)[:, None] * V + e[None, :], answer, mask=(e < V)[None, :])
            before += tl.dot(tl.trans(asks * lag), answer, input_precision=PRECISION)
            if PLAIN:
                value += tl.dot(tl.load(at + 2 * C * C), answer, input_precision=PRECISION)
            else:
                value += tl.load(beta + row, mask=real, other=0.0).to(tl.float32)[:, None] * answer
        memory = before
        to = dv + row[:, None] * V + e[None, :]
        tl.store(to, value.to(dv.dtype.element_ty), mask=here[:, None] & (e < V)[None, :])
    tl.store(dstate + bh.to(tl.int64) * K * V + tile, memory, mask=held)


@triton.jit
def score_grads(
    q, k, v, decay, a, b, beta, segments, number, scores, dy, u, dr, dscores, ddecay, dbeta, N, T, H, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores, and what they alone give to those of a decay per head and of beta."""
    READS: tl.constexpr = u is not None
    PLAIN: tl.constexpr = beta is None
    COUNT: tl.constexpr = 4 if PLAIN and READS else 2 if READS else 1
    bh, chunk, t, here, row = placed(C, N, T, H)
    real = real_tokens(segments, bh // H, t, T, N)
    i = tl.arange(0, C)
    n = bh.to(tl.int64) * tl.cdiv(N, C) + chunk
    q_k = tl.zeros((C, C), tl.float32)
    q_b = tl.zeros((C, C), tl.float32)
    a_k = tl.zeros((C, C), tl.float32)
    a_b = tl.zeros((C, C), tl.float32)
    rate = tl.zeros((C,), tl.float32)
    for first in range(0, V, BV):
        e = first + tl.arange(0, BV)
        given = rows_of(dy, row, real, V, e)
        value = rows_of(v, row, real, V, e)
        if PLAIN:
            q_k += product(given, value, PRECISION)
        if READS:
            answer = tl.trans(rows_of(u, n * C + i, i < C, V, e))
            asked = rows_of(dr, n * C + i, i < C, V, e)
            q_b += tl.dot(given.to(tl.float32), answer, input_precision=PRECISION)
            a_b += tl.dot(asked, answer, input_precision=PRECISION)
            if PLAIN:
                a_k += tl.dot(asked, tl.trans(value.to(tl.float32)), input_precision=PRECISION)
            else:
                rate += tl.sum(asked * value.to(tl.float32), 1)
    at = n * COUNT * C * C + i[:, None] * C + i[None, :]
    met = tl.zeros((C, C), tl.float32)
    if PLAIN:
        tl.store(dscores + at, q_k)
        if READS:
            tl.store(dscores + at + C * C, q_b)
            tl.store(dscores + at + 2 * C * C, a_k)
            tl.store(dscores + at + 3 * C * C, a_b)
        else:
            met += q_k * tl.load(scores + at)
    else:
        tl.store(dscores + at, q_b)
        tl.store(dscores + at + C * C, a_b)
        tl.store(dbeta + row, rate, mask=here)
        met += q_b * tl.load(scores + at) + a_b * tl.load(scores + at + C * C)
    if not CHANNEL:
        # Of token t: what i < t gives to s >= t.
        earlier = (tl.cumsum(met.to(tl.float64), 1) - met).to(tl.float32)
        straddling = tl.where((i[:, None] >= i[None, :]) & real[None, :], earlier, 0.0)
        tl.store(ddecay + row, tl.sum(straddling, 0), mask=here)


@triton.jit
def key_grads(
    q, k, v, decay, a, b, beta, segments, number, dscores, dy, u, dr, starts, ends,
    dq, dk, da, db, ddecay, dbeta, N, T, H, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's queries, keys, a and b in a block of key channels, and of decay and beta."""
    READS: tl.constexpr = u is not None
    PLAIN: tl.constexpr = beta is None
    LAG: tl.constexpr = a is not None
    LEVELS: tl.constexpr = 6 if C == 64 else 5 if C == 32 else 4
    COUNT: tl.constexpr = 4 if PLAIN and READS else 2 if READS else 1
    bh, chunk, t, here, row = placed(C, N, T, H)
    at_b, at_h = bh // H, bh % H
    real = real_tokens(segments, at_b, t, T, N)
    i = tl.arange(0, C)
    n = bh.to(tl.int64) * tl.cdiv(N, C) + chunk
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    from_q = tl.zeros((C, BK), tl.float32)
    from_k = tl.zeros((C, BK), tl.float32)
    from_a = tl.zeros((C, BK), tl.float32)
    from_b = tl.zeros((C, BK), tl.float32)
    over = tl.zeros((BK,), tl.float32)
    for first in range(0, V, BV):
        e = first + tl.arange(0, BV)
        held = (d < K)[:, None] & (e < V)[None, :]
        at = n * K * V + d[:, None] * V + e[None, :]
        start = tl.load(starts + at, mask=held, other=0.0)
        end = tl.load(ends + at, mask=held, other=0.0)
        over += tl.sum(start * end, 1)
        given = rows_of(dy, row, real, V, e).to(tl.float32)
        from_q += tl.dot(given, tl.trans(start), input_precision=PRECISION)
        if PLAIN:
            value = rows_of(v, row, real, V, e).to(tl.float32)
            from_k += tl.dot(value, tl.trans(end), input_precision=PRECISION)
        if READS:
            asked = rows_of(dr, n * C + i, i < C, V, e)
            from_a += tl.dot(asked, tl.trans(start), input_precision=PRECISION)
            answer = rows_of(u, n * C + i, i < C, V, e)
            from_b += tl.dot(answer, tl.trans(end), input_precision=PRECISION)
    since, lag, until, across = chunk_decays(
        decay, segments, number, at_b, at_h, chunk, t, T, N, H, d, K, C, CHANNEL, LAG
    )
    query = rows_of(q, row, real, K, d).to(tl.float32) * scale
    key = rows_of(k, row, real, K, d).to(tl.float32)
    from_q *= since
    from_k *= until
    reads = query * from_q
    late = tl.zeros((C, BK), tl.float32)
    kept = key * from_k
    if READS:
        asks, along = readers(k, a, b, beta, row, real, K, d)
        from_a *= lag
        from_b *= until
        kept += along * from_b
        if LAG:
            late += asks * from_a
        else:
            reads += asks * from_a
    # A token's decay is in what reads at or after it (`late`: after it) and in what was kept before it.
    change = tl.zeros((C, BK), tl.float32)
    if CHANNEL:
        change += (over * across)[None, :] + run_sums(reads, C, C, True, True) + run_sums(kept, C, C, False, False)
        if LAG:
            change += run_sums(late, C, C, True, False)
    else:
        of_head = tl.sum(kept, 1).to(tl.float64)
        of_head = tl.cumsum(of_head, 0) - of_head
        of_head += tl.cumsum(tl.sum(reads, 1).to(tl.float64), 0, reverse=True) + tl.sum(over * across, 0)
    same = same_document(number, at_b, t, T, N, C)
    at = dscores + n * COUNT * C * C + i[:, None] * C + i[None, :]
    diagonal = i[:, None] == i[None, :]
    q_k = tl.zeros((C, C), tl.float32)
    q_b = tl.zeros((C, C), tl.float32)
    a_k = tl.zeros((C, C), tl.float32)
    a_b = tl.zeros((C, C), tl.float32)
    if PLAIN:
        q_k += tl.where(same, tl.load(at), 0.0)
        if READS:
            q_b += tl.where(same, tl.load(at + C * C), 0.0)
            a_k += tl.where(same, tl.load(at + 2 * C * C), 0.0)
            a_b += tl.where(same, tl.load(at + 3 * C * C), 0.0)
    else:
        q_b += tl.where(same, tl.load(at), 0.0)
        a_b += tl.where(same, tl.load(at + C * C), 0.0)
    if CHANNEL:
        gate = gates(decay, segments, at_b, at_h, t, T, N, H, K, d)
        if PLAIN:
            own = tl.sum(tl.where(diagonal, q_k, 0.0), 1)[:, None]
            from_q += own * key
            from_k += own * query
        if READS:
            own = tl.sum(tl.where(diagonal, q_b, 0.0), 1)[:, None]
            from_q += own * along
            from_b += own * query
        for power in range(LEVELS):
            since, lag, until = factors(gate, 1 << power, C, LAG)
            meet = meeting(1 << power, C)
            of_q = tl.zeros((C, BK), tl.float32)
            of_a = tl.zeros((C, BK), tl.float32)
            kept = tl.zeros((C, BK), tl.float32)
            if PLAIN:
                score = tl.where(meet, q_k, 0.0)
                of_q += tl.dot(score, key * until, input_precision=PRECISION)
                of_k = tl.dot(tl.trans(score), query * since, input_precision=PRECISION)
                if READS:
                    score = tl.where(meet, a_k, 0.0)
                    of_a += tl.dot(score, key * until, input_precision=PRECISION)
                    of_k += tl.dot(tl.trans(score), asks * lag, input_precision=PRECISION)
                of_k *= until
                from_k += of_k
                kept += key * of_k
            if READS:
                score = tl.where(meet, q_b, 0.0)
                of_q += tl.dot(score, along * until, input_precision=PRECISION)
                of_b = tl.dot(tl.trans(score), query * since, input_precision=PRECISION)
                score = tl.where(meet, a_b, 0.0)
                of_a += tl.dot(score, along * until, input_precision=PRECISION)
                of_b += tl.dot(tl.trans(score), asks * lag, input_precision=PRECISION)
                of_b *= until
                from_b += of_b
                kept += along * of_b
                of_a *= lag
                from_a += of_a
            of_q *= since
            from_q += of_q
            reads = query * of_q
            if READS:
                if LAG:
                    late = asks * of_a
                    change += run_sums(late, 1 << power, C, True, False)
                else:
                    reads += asks * of_a
            change += run_sums(reads, 1 << power, C, True, True) + run_sums(kept, 1 << power, C, False, False)
    else:
        between = between_tokens(decay, segments, at_b, at_h, t, T, N, H, C)
        if PLAIN:
            q_k *= between
            from_q += tl.dot(q_k, key, input_precision=PRECISION)
            from_k += tl.dot(tl.trans(q_k), query, input_precision=PRECISION)
        else:
            q_b *= between
            a_b *= tl.where(diagonal, 0.0, between)
            from_q += tl.dot(q_b, along, input_precision=PRECISION)
            from_a += tl.dot(a_b, along, input_precision=PRECISION)
            from_b += tl.dot(tl.trans(q_b), query, input_precision=PRECISION)
            from_b += tl.dot(tl.trans(a_b), asks, input_precision=PRECISION)
    mask = here[:, None] & (d < K)[None, :]
    at = row[:, None] * K + d[None, :]
    part = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // (tl.cdiv(N, C) * H)) * T * H + row
    if beta is not None:
        rate = tl.load(beta + row, mask=real, other=0.0).to(tl.float32)
        from_k = from_b - rate[:, None] * from_a
        tl.store(dbeta + part, -tl.sum(from_a * along, 1), mask=here)
    if LAG:
        tl.store(da + at, from_a.to(da.dtype.element_ty), mask=mask)
        tl.store(db + at, tl.where(real[:, None], from_b, 0.0).to(db.dtype.element_ty), mask=mask)
    tl.store(dq + at, (from_q * scale).to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + at, tl.where(real[:, None], from_k, 0.0).to(dk.dtype.element_ty), mask=mask)
    if CHANNEL:
        change = tl.where(real[:, None], change, 0.0)
        tl.store(ddecay + at, change.to(ddecay.dtype.element_ty), mask=mask)
    else:
        tl.store(ddecay + part, tl.where(real, of_head, 0.0).to(tl.float32), mask=here)
