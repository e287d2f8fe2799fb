"""From products of queries and keys to logits, inside Triton kernels: scale, soft cap, distance; in base 2."""

import triton
import triton.language as tl


@triton.jit
def logits(s, near, slope, scale, CAP: tl.constexpr, SLOPED: tl.constexpr, CAUSAL: tl.constexpr):
    """Logits times log2(e), and the slope of the cap, for the gradient.

    near: position of the query minus that of the key, read where SLOPED.
    """
    bend = s
    if CAP > 0:
        t = _tanh(s * (scale / CAP))
        s = t * (CAP * 1.4426950408889634)
        bend = 1.0 - t * t
    else:
        s *= scale * 1.4426950408889634
    if SLOPED:
        s -= (slope * 1.4426950408889634) * tl.abs(near).to(tl.float32)
    return s, bend


@triton.jit
def _tanh(x):
    """Exact to fp32 rounding everywhere: a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel."""
    size = tl.abs(x)
    z = x * x
    p = (
        (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    ) - 0.333332819422
    large = 1.0 - 2.0 / (tl.exp2(size * 2.8853900817779268) + 1.0)
    return tl.where(size < 0.625, x + x * z * p, tl.where(x < 0, -large, large))
