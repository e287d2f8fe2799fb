"""Attention on a GPU: `flash` where all tokens are of this call, `decode` where there is a past or a draft tree.

The gradient of the latter is that of the chunked form: training through a past is rare, and prefill and decode have
none.
"""

import math

import torch
from torch import Tensor

from kernels.attention import decode, flash, flash_grad
from kernels.attention.chunked import grad as chunked_grad
from kernels.attention.tiles import Places, lined

SAVED = 1
WHOLE = True


def takes(q, k, v, past_k, past_v, length, positions, segments, table, slopes, sinks, parents, *_) -> bool:
    """Sizes of up to 256; with a past or a tree keys of up to 1,024 and values of up to 512; trees of up to 64."""
    if _walks(past_k, parents):
        tree = parents is None or parents.shape[1] <= decode.TREE
        return tree and q.shape[3] <= 1024 and v.shape[3] <= 512
    return max(q.shape[3], v.shape[3]) <= 256


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
    slopes_H: Tensor | None,
    sinks_H: Tensor | None,
    parents_BT: Tensor | None,
    scale: float,
    window: int,
    causal: bool,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, V), and each query's lse (B, H, T) for the gradient, empty from `decode`."""
    if _walks(past_k, parents_BT):
        past = (past_k, past_v, length_B, positions_BT, segments_BT, table_BN)
        options = (slopes_H, sinks_H, parents_BT, scale, window, causal, softcap)
        return decode.attend(q_BTHK, k_BTGK, v_BTGV, *past, *options), q_BTHK.new_empty(0, dtype=torch.float32)
    places = _places(positions_BT, segments_BT, slopes_H, window)
    q, k, v = (lined(x) for x in (q_BTHK, k_BTGK, v_BTGV))
    return flash.forward(q, k, v, places, slopes_H, sinks_H, scale, window, causal, softcap, q.dtype)


def fake(q, k, v, past_k, past_v, length, positions, segments, table, slopes, sinks, parents, *_):
    rows, tokens, heads, _ = q.shape
    kept = (0,) if _walks(past_k, parents) else (rows, heads, tokens)
    return q.new_empty(rows, tokens, heads, v.shape[3]), q.new_empty(kept, dtype=torch.float32)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    q, k, v, past_k, _, _, positions, segments, _, slopes, sinks, parents, scale, window, causal, softcap = args
    if _walks(past_k, parents):
        return chunked_grad(args, outputs, grads, needs)
    y, lse = outputs
    q, k, v, dy = (lined(x) for x in (q, k, v, grads[0]))
    fall = None if q.dtype == torch.float32 else flash_grad.delta(y, dy)
    places = _places(positions, segments, slopes, window)
    dq, dk, dv, fall, dslopes = flash_grad.grad(
        q, k, v, places, slopes, sinks, scale, window, causal, softcap, lse, fall, dy, q.dtype
    )
    found = {0: dq, 1: dk, 2: dv}
    if needs[9]:
        found[9] = dslopes.sum((0, 2)).to(slopes.dtype)
    if needs[10]:
        missed = torch.exp2(sinks.float()[:, None] / math.log(2) - lse)
        found[10] = -(missed * fall).sum((0, 2)).to(sinks.dtype)
    return [found[i] for i, need in enumerate(needs) if need]


def _walks(past_k: Tensor | None, parents: Tensor | None) -> bool:
    return past_k is not None or parents is not None


def _places(positions: Tensor | None, segments: Tensor | None, slopes: Tensor | None, window: int) -> Places:
    """Positions matter where distances do, and differ from those of columns only where there is padding."""
    if segments is None:
        return Places()
    at = positions if window or slopes is not None else None
    return Places(at, at, segments, segments)
