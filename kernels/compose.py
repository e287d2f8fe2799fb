"""How two linear maps follow each other, for tl.associative_scan: h -> a h + x, then h -> b h + y."""

import triton
import triton.language as tl


@triton.jit
def linear(a, x, b, y):
    return b * a, b * x + y


@triton.jit
def complex_linear(ar, ai, xr, xi, br, bi, yr, yi):
    return br * ar - bi * ai, br * ai + bi * ar, br * xr - bi * xi + yr, br * xi + bi * xr + yi


@triton.jit
def row(tile, ROW: tl.constexpr, ROWS: tl.constexpr):
    """One row of a tile (ROWS, D)."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == ROW)[:, None], tile, 0.0), 0)


@triton.jit
def linear_before(a, x, p, q, b, y, r, s):
    """Beside each run of maps the same run without its last: what comes before each row. One map is (a, x, 1, 0)."""
    return b * a, b * x + y, r * a, r * x + s


@triton.jit
def max_plus(a, x, b, y):
    """h -> max(a + h, x), then h -> max(b + h, y)."""
    return a + b, tl.maximum(x + b, y)
