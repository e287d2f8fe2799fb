"""Long convolution on a GPU: Fourier transforms as matrix products, whole sequences on chip.

A transform of length N = P Q, of x laid out as P rows of Q, is F_P x, times twiddle factors, times F_Q: two products
with small matrices. Two rows of the batch go through as the real and imaginary halves of one sequence, which a real
filter leaves apart. Up to LIMIT places, padding included; longer calls go to `chunked`, whose transforms are cuFFT's.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch, precision

LIMIT = 4096  # 64 by 64: the matrices of more do not fit beside the data


def takes(x_BTD: Tensor, filter_DL: Tensor, skip_D: Tensor | None) -> bool:
    """Whether sequence and filter fit into one program."""
    tokens = x_BTD.shape[1]
    return tokens + min(tokens, filter_DL.shape[1]) - 1 <= LIMIT


def forward(x_BTD: Tensor, filter_DL: Tensor, skip_D: Tensor | None) -> Tensor:
    """As `reference`."""
    rows, tokens, size = x_BTD.shape
    if x_BTD.numel() == 0:
        return torch.empty_like(x_BTD)
    x = x_BTD.transpose(1, 2).contiguous()
    y = torch.empty_like(x)
    p, q, tables, spectrum = _tables(filter_DL, tokens)
    launch(
        _forward, (size, triton.cdiv(rows, 2)), x, skip_D, y, spectrum, *tables, rows, tokens, size,
        p, q, precision(x.dtype), num_warps=8, num_stages=1,
    )  # fmt: skip
    return y.transpose(1, 2)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """By the adjoint, one program for each channel: x's gradient, and the filter's summed over the batch."""
    x_BTD, filter_DL, skip_D = args
    rows, tokens, size = x_BTD.shape
    if x_BTD.numel() == 0:
        return [torch.zeros_like(arg) for arg, need in zip(args, needs, strict=True) if need]
    x, g = (v.transpose(1, 2).contiguous() for v in (x_BTD, grads[0]))
    dx = torch.empty_like(x)
    dfilter = filter_DL.new_zeros(filter_DL.shape, dtype=torch.float32)
    p, q, tables, spectrum = _tables(filter_DL, tokens)
    launch(
        _backward, (size,), x, skip_D, g, dx, dfilter, spectrum, *tables, rows, tokens, size, filter_DL.shape[1],
        p, q, precision(x.dtype), num_warps=8, num_stages=1,
    )  # fmt: skip
    dskip = None if skip_D is None else (g.float() * x.float()).sum((0, 2)).to(skip_D.dtype)
    found = (dx.transpose(1, 2), dfilter.to(filter_DL.dtype), dskip)
    return [v for v, need in zip(found, needs, strict=True) if need]


def _tables(filter_DL: Tensor, tokens: int) -> tuple[int, int, list[Tensor], Tensor]:
    """P, Q, what the transform needs, and the filter's spectrum over N as it comes out of one, (D, P, Q, 2)."""
    weight = filter_DL[:, :tokens].float()
    length = max(256, triton.next_power_of_2(tokens + weight.shape[1] - 1))
    bits = length.bit_length() - 1
    p, q = 1 << bits // 2, 1 << (bits - bits // 2)
    spectrum = torch.fft.fft(weight, length) / length  # place k1 + P k2 belongs to row k1, column k2
    spectrum = torch.view_as_real(spectrum.view(-1, q, p).transpose(1, 2).contiguous())
    return p, q, [t.to(weight.device) for t in _factors(p, q)], spectrum


@functools.cache
def _factors(p: int, q: int) -> list[Tensor]:
    """F_P, the twiddle factors and F_Q, real and imaginary parts, on the CPU."""
    made = []
    for rows, columns, length in ((p, p, p), (p, q, p * q), (q, q, q)):
        turns = torch.arange(rows)[:, None] * torch.arange(columns) % length
        angle = turns.double() * (-2 * torch.pi / length)
        made += [angle.cos().float(), angle.sin().float()]
    return made


@triton.jit
def _product(ar, ai, br, bi, PRECISION: tl.constexpr):
    """Of two complex matrices."""
    re = tl.dot(ar, br, input_precision=PRECISION) - tl.dot(ai, bi, input_precision=PRECISION)
    im = tl.dot(ar, bi, input_precision=PRECISION) + tl.dot(ai, br, input_precision=PRECISION)
    return re, im


@triton.jit
def _table(base, P: tl.constexpr, Q: tl.constexpr):
    return tl.load(base + tl.arange(0, P)[:, None] * Q + tl.arange(0, Q)[None, :])


@triton.jit
def _spectrum(base, d, P: tl.constexpr, Q: tl.constexpr):
    at = base + ((d * P + tl.arange(0, P)[:, None]) * Q + tl.arange(0, Q)[None, :]) * 2
    return tl.load(at), tl.load(at + 1)


@triton.jit
def _transform(
    re, im, fp_re, fp_im, tw_re, tw_im, fq_re, fq_im, P: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr
):
    re, im = _product(_table(fp_re, P, P), _table(fp_im, P, P), re, im, PRECISION)
    tr, ti = _table(tw_re, P, Q), _table(tw_im, P, Q)
    re, im = re * tr - im * ti, re * ti + im * tr
    return _product(re, im, _table(fq_re, Q, Q), _table(fq_im, Q, Q), PRECISION)


@triton.jit
def _inverse(
    re, im, fp_re, fp_im, tw_re, tw_im, fq_re, fq_im, P: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr
):
    """The transform back, without its factor 1 / N."""
    re, im = _product(re, im, _table(fq_re, Q, Q), -_table(fq_im, Q, Q), PRECISION)
    tr, ti = _table(tw_re, P, Q), -_table(tw_im, P, Q)
    re, im = re * tr - im * ti, re * ti + im * tr
    return _product(_table(fp_re, P, P), -_table(fp_im, P, P), re, im, PRECISION)


@triton.jit
def _pair(base, pair, d, rows, tokens, D, n):
    """Rows 2 pair and 2 pair + 1 of one channel of (B, D, T), 0 where there are none."""
    at = base + (2 * pair * D + d) * tokens + n
    re = tl.load(at, mask=n < tokens, other=0.0).to(tl.float32)
    im = tl.load(at + D * tokens, mask=(n < tokens) & (2 * pair + 1 + 0 * n < rows), other=0.0).to(tl.float32)
    return re, im


@triton.jit
def _put(base, pair, d, rows, tokens, D, n, re, im):
    at = base + (2 * pair * D + d) * tokens + n
    tl.store(at, re.to(base.dtype.element_ty), mask=n < tokens)
    tl.store(at + D * tokens, im.to(base.dtype.element_ty), mask=(n < tokens) & (2 * pair + 1 + 0 * n < rows))


@triton.jit
def _forward(
    x, skip, y, spectrum, fp_re, fp_im, tw_re, tw_im, fq_re, fq_im, rows, tokens, D,
    P: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    d, pair = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = tl.arange(0, P)[:, None] * Q + tl.arange(0, Q)[None, :]
    re, im = _pair(x, pair, d, rows, tokens, D, n)
    re, im = _transform(re, im, fp_re, fp_im, tw_re, tw_im, fq_re, fq_im, P, Q, PRECISION)
    hr, hi = _spectrum(spectrum, d, P, Q)
    re, im = re * hr - im * hi, re * hi + im * hr
    re, im = _inverse(re, im, fp_re, fp_im, tw_re, tw_im, fq_re, fq_im, P, Q, PRECISION)
    if skip is not None:
        s = tl.load(skip + d).to(tl.float32)
        xr, xi = _pair(x, pair, d, rows, tokens, D, n)
        re, im = re + s * xr, im + s * xi
    _put(y, pair, d, rows, tokens, D, n, re, im)


@triton.jit
def _backward(
    x, skip, g, dx, dfilter, spectrum, fp_re, fp_im, tw_re, tw_im, fq_re, fq_im, rows, tokens, D, taps,
    P: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, P)[:, None] * Q + tl.arange(0, Q)[None, :]
    sum_re = tl.zeros((P, Q), tl.float32)
    sum_im = tl.zeros((P, Q), tl.float32)
    for pair in range(0, tl.cdiv(rows, 2)):
        at = pair + 0 * d
        re, im = _pair(g, at, d, rows, tokens, D, n)
        gr, gi = _transform(re, im, fp_re, fp_im, tw_re, tw_im, fq_re, fq_im, P, Q, PRECISION)
        xr, xi = _pair(x, at, d, rows, tokens, D, n)
        xr, xi = _transform(xr, xi, fp_re, fp_im, tw_re, tw_im, fq_re, fq_im, P, Q, PRECISION)
        sum_re += gr * xr + gi * xi  # times the conjugate; the rows of a pair meet in the imaginary part alone
        sum_im += gi * xr - gr * xi
        hr, hi = _spectrum(spectrum, d, P, Q)
        dr, di = gr * hr + gi * hi, gi * hr - gr * hi
        dr, di = _inverse(dr, di, fp_re, fp_im, tw_re, tw_im, fq_re, fq_im, P, Q, PRECISION)
        if skip is not None:
            s = tl.load(skip + d).to(tl.float32)
            re, im = _pair(g, at, d, rows, tokens, D, n)
            dr, di = dr + s * re, di + s * im
        _put(dx, at, d, rows, tokens, D, n, dr, di)
    re, im = _inverse(sum_re, sum_im, fp_re, fp_im, tw_re, tw_im, fq_re, fq_im, P, Q, PRECISION)
    tl.store(dfilter + d * taps + n, re / (P * Q), mask=(n < taps) & (n < tokens))
