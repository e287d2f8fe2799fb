"""What the kernels of a matrix memory load and make of a chunk: tiles, masks of documents and padding, decays."""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-200.0)  # as chunks.FLOOR


@triton.jit
def placed(C: tl.constexpr, N, T, H):
    """Of a program of all chunks at once: its row and head, chunk, tokens, which of them are inside, and their rows in
    memory."""
    chunks = tl.cdiv(N, C)
    chunk = tl.program_id(0) % chunks
    bh = tl.program_id(0) // chunks
    t = chunk * C + tl.arange(0, C)
    return bh, chunk, t, t < N, ((bh // H).to(tl.int64) * T + t) * H + bh % H


@triton.jit
def real_tokens(segments, b, t, T, N):
    """Which tokens are there and no padding."""
    real = (t >= 0) & (t < N)
    if segments is not None:
        real &= tl.load(segments + b.to(tl.int64) * T + t, mask=real, other=-1) >= 0
    return real


@triton.jit
def rows_of(x, row, here, size: tl.constexpr, d):
    """Rows (C, block) of a (..., size) tensor, as stored."""
    return tl.load(x + row[:, None] * size + d[None, :], mask=here[:, None] & (d < size)[None, :], other=0.0)


@triton.jit
def run_sums(x, run, C: tl.constexpr, AFTER: tl.constexpr, OWN: tl.constexpr):
    """Of each token, the sum of x (C, block) over the tokens of its run before it, or after it; with its own or not.
    A product with ones and zeros: what is left out is not subtracted again. x keeps 22 bits or more."""
    i = tl.arange(0, C)
    taken = i[:, None] < i[None, :] if AFTER else i[:, None] > i[None, :]
    if OWN:
        taken |= i[:, None] == i[None, :]
    taken &= i[:, None] // run == i[None, :] // run
    return tl.dot(taken.to(tl.float32), x, input_precision="tf32x3")


@triton.jit
def gates(decay, segments, b, h, t, T, N, H, K: tl.constexpr, d):
    """Decays (C, block) of tokens t, 0 where there is none or padding."""
    row = (b.to(tl.int64) * T + t) * H + h
    x = rows_of(decay, row, real_tokens(segments, b, t, T, N), K, d).to(tl.float32)
    return tl.maximum(x, FLOOR)


@triton.jit
def factors(gate, run, C: tl.constexpr, LAG: tl.constexpr):
    """In runs of tokens: decay from the run's start to t, the same for readers (LAG: without t's own), to its end."""
    since = tl.exp(run_sums(gate, run, C, False, True))
    lag = since
    if LAG:
        lag = tl.exp(run_sums(gate, run, C, False, False))
    return since, lag, tl.exp(run_sums(gate, run, C, True, False))


@triton.jit
def head_decays(decay, segments, b, h, t, T, N, H):
    """Running sums of one decay per head and their total, in doubles: their differences stay exact."""
    real = real_tokens(segments, b, t, T, N)
    x = tl.load(decay + (b.to(tl.int64) * T + t) * H + h, mask=real, other=0.0).to(tl.float32)
    x = tl.maximum(x, FLOOR).to(tl.float64)
    return tl.cumsum(x, 0), tl.sum(x, 0)


@triton.jit
def chunk_decays(
    decay, segments, number, b, h, chunk, t, T, N, H, d,
    K: tl.constexpr, C: tl.constexpr, CHANNEL: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    """From the chunk's start to t (queries, and readers), from t to its end, and across it, documents masked."""
    if CHANNEL:
        gate = gates(decay, segments, b, h, t, T, N, H, K, d)
        since, lag, until = factors(gate, C, C, LAG)
        across = tl.exp(tl.sum(gate, 0))
    else:
        g, total = head_decays(decay, segments, b, h, t, T, N, H)
        since = tl.exp(g.to(tl.float32))[:, None]
        lag = since
        until = tl.exp((total - g).to(tl.float32))[:, None]
        across = tl.exp(tl.full((1,), 0.0, tl.float32) + total.to(tl.float32))
    if number is not None:
        at = number + b.to(tl.int64) * T
        n = tl.load(at + tl.minimum(t, N - 1))
        enters = tl.load(at + tl.maximum(chunk * C - 1, 0))
        enters = tl.where(chunk == 0, 0, enters)
        ends = tl.load(at + tl.minimum(chunk * C + C, N) - 1)
        since = tl.where((n == enters)[:, None], since, 0.0)
        lag = tl.where((n == enters)[:, None], lag, 0.0)
        until = tl.where((n == ends)[:, None], until, 0.0)
        across = tl.where(ends == enters, across, 0.0)
    return since, lag, until, across


@triton.jit
def same_document(number, b, t, T, N, C: tl.constexpr):
    """Which pairs of tokens are of one document."""
    same = tl.full((C, C), True, tl.int1)
    if number is not None:
        n = tl.load(number + b.to(tl.int64) * T + tl.minimum(t, N - 1))
        same = n[:, None] == n[None, :]
    return same


@triton.jit
def meeting(run, C: tl.constexpr):
    """Which pairs of tokens meet at the border of two neighbouring runs."""
    run = tl.arange(0, C) // run
    return (run % 2 == 1)[:, None] & (run[None, :] + 1 == run[:, None])


@triton.jit
def between_tokens(decay, segments, b, h, t, T, N, H, C: tl.constexpr):
    """One decay per head from i to t, for i <= t."""
    g, total = head_decays(decay, segments, b, h, t, T, N, H)
    i = tl.arange(0, C)
    lower = i[:, None] >= i[None, :]
    return tl.where(lower, tl.exp(tl.where(lower, g[:, None] - g[None, :], 0.0).to(tl.float32)), 0.0)


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """x y^T of tiles as stored: in their own dtype where they share one."""
    if x.dtype == y.dtype:
        return tl.dot(x, tl.trans(y), input_precision=PRECISION)
    return tl.dot(x.to(tl.float32), tl.trans(y.to(tl.float32)), input_precision=PRECISION)


@triton.jit
def readers(k, a, b, beta, row, real, K: tl.constexpr, d):
    """Tiles of what reads the memory and of where the answer goes: a and b, or -beta k and k."""
    if beta is not None:
        along = rows_of(k, row, real, K, d).to(tl.float32)
        rate = tl.load(beta + row, mask=real, other=0.0).to(tl.float32)
        asks = -rate[:, None] * along
    else:
        along = rows_of(b, row, real, K, d).to(tl.float32)
        asks = rows_of(a, row, real, K, d).to(tl.float32)
    return asks, along
