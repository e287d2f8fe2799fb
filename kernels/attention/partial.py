"""Attention to one block of keys at arbitrary positions: what a ring of ranks adds up, and its gradient.

Results of several blocks of keys make those of all: with l = logsumexp of the lse, y = sum(exp(lse_i - l) * y_i); and
with this l and delta = sum(dy * y) of the whole, each block's gradients are its share of the whole ones.

lse is subtracted from logits of its size, and what it is rounded by are relative errors of all weights: so it is in
float64, a number a head.

A query at p sees a key at j of the same document (equal segment numbers, none negative) where, if causal, j <= p and,
with a window, j > p - window. Neither `attend` nor `attend_grad` is recorded by autograd.
"""

import math

import torch
from torch import Tensor

from kernels import op
from kernels.attention.chunked import silence

BLOCK = 256  # queries whose weights exist at one time, in plain torch


@torch.no_grad()
def attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    q_segments_BT: Tensor | None,
    k_segments_BS: Tensor | None,
    scale: float,
    window: int = 0,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, V) in fp32 at least and lse (B, T, H) in float64; 0 and -inf where a query sees nothing.

    Positions and segments int64; segments both None: one document.
    """
    places = (q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS)
    if _on_gpu(q_BTHK):
        from kernels.attention import flash
        from kernels.attention.tiles import Places, lined

        q, k, v = (lined(x) for x in (q_BTHK, k_BSGK, v_BSGV))
        y, lse_BHT = flash.forward(q, k, v, Places(*places), None, None, scale, window, causal, 0.0, torch.float32)
        return y, lse_BHT.transpose(1, 2).double() * math.log(2)
    rows, tokens, heads, _ = q_BTHK.shape
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    y_BTHV = q_BTHK.new_zeros(rows, tokens, heads, v_BSGV.shape[3], dtype=wide)
    lse_BTH = q_BTHK.new_full((rows, tokens, heads), -torch.inf, dtype=torch.float64)
    q = _grouped(silence(q_BTHK, q_segments_BT), k_BSGK.shape[2], wide)
    k, v = (silence(x, k_segments_BS).to(wide).transpose(1, 2) for x in (k_BSGK, v_BSGV))
    for queries, keys, sees in _blocks(places, window, causal):
        # In the order of `attend_grad`: logits with the same roundings, or else a weight near 1 would not be so there.
        logits = _logits(q[:, :, queries].flip(2), k[:, :, keys], sees.flip(1), scale)
        top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
        weights = torch.exp(logits - top)
        total = weights.sum(-1, keepdim=True)  # 0 where nothing is seen
        y = (weights.flatten(2, 3) @ v[:, :, keys]).view(*total.shape[:4], -1) / torch.where(total > 0, total, 1)
        lse = (top + total.double().log())[..., 0]
        y_BTHV[:, queries], lse_BTH[:, queries] = _flat(y.flip(2)), _flat(lse[..., None].flip(2))[..., 0]
    return y_BTHV, lse_BTH


def merge(y_BTHV: Tensor, lse_BTH: Tensor, part_BTHV: Tensor, part_lse_BTH: Tensor) -> None:
    """Add what one more block of keys gives to y and lse, in place."""
    # By the difference alone, so that shares add up to 1; nothing seen on either side would be nan.
    share_BTH = torch.sigmoid(part_lse_BTH - lse_BTH).masked_fill(part_lse_BTH == -torch.inf, 0)
    y_BTHV.lerp_(part_BTHV, share_BTH.to(y_BTHV.dtype)[..., None])
    lse_BTH.copy_(torch.logaddexp(lse_BTH, part_lse_BTH))


def delta_of(dy_BTHV: Tensor, y_BTHV: Tensor) -> Tensor:
    """sum(dy * y) over V, (B, T, H), in fp32 at least: what `attend_grad` takes of all blocks together."""
    return (dy_BTHV.to(torch.promote_types(dy_BTHV.dtype, torch.float32)) * y_BTHV).sum(-1)


@torch.no_grad()
def attend_grad(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    q_segments_BT: Tensor | None,
    k_segments_BS: Tensor | None,
    scale: float,
    window: int,
    causal: bool,
    lse_BTH: Tensor,
    delta_BTH: Tensor,
    dy_BTHV: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in fp32 at least: what this block adds, given lse and delta = sum(dy * y) over all blocks."""
    places = (q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS)
    if _on_gpu(q_BTHK):
        from kernels.attention import flash_grad
        from kernels.attention.tiles import Places, lined

        q, k, v, dy = (lined(x) for x in (q_BTHK, k_BSGK, v_BSGV, dy_BTHV.to(q_BTHK.dtype)))
        lse, delta = (x.float().transpose(1, 2).contiguous() for x in (lse_BTH / math.log(2), delta_BTH))
        found = flash_grad.grad(
            q, k, v, Places(*places), None, None, scale, window, causal, 0.0, lse, delta, dy, torch.float32
        )
        return found[:3]
    groups = k_BSGK.shape[2]
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    q, g = (_grouped(silence(x, q_segments_BT), groups, wide) for x in (q_BTHK, dy_BTHV))
    lse = lse_BTH.clamp(min=torch.finfo(wide).min)
    lse, rest, delta = (_grouped(x[..., None], groups, wide) for x in (lse, lse - lse.to(wide), delta_BTH))
    k, v = (silence(x, k_segments_BS).to(wide).transpose(1, 2) for x in (k_BSGK, v_BSGV))
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for queries, keys, sees in _blocks(places, window, causal, reverse=True):
        # The last query first: see `chunked._backwards`.
        qb, gb, lse_b, rest_b, delta_b = (x[:, :, queries].flip(2) for x in (q, g, lse, rest, delta))
        logits = _logits(qb, k[:, :, keys], sees.flip(1), scale)
        weights = logits.sub_(lse_b).sub_(rest_b).exp_().flatten(2, 3)
        gb, qb = gb.flatten(2, 3), qb.flatten(2, 3)
        found = weights * (gb @ v[:, :, keys].transpose(-1, -2) - delta_b.flatten(2, 3)) * scale
        dq[:, :, queries] = (found @ k[:, :, keys]).view(*lse_b.shape[:4], -1).flip(2)
        dk[:, :, keys] += found.transpose(-1, -2) @ qb
        dv[:, :, keys] += weights.transpose(-1, -2) @ gb
    return _flat(dq), dk.transpose(1, 2), dv.transpose(1, 2)


def _on_gpu(x: Tensor) -> bool:
    if x.dtype == torch.float64:
        return False
    return op.FORM == "triton" or (not op.FORM and x.is_cuda)


def _blocks(places, window, causal, reverse=False):
    """(queries, keys, which of them see each other (B, queries, keys)), leaving out what nothing sees."""
    q_at, k_at, q_in, k_in = places
    starts = range(0, q_at.shape[1], BLOCK)
    for start in reversed(starts) if reverse else starts:
        queries = slice(start, start + BLOCK)
        near = q_at[:, queries, None] - k_at[:, None]
        sees = near >= 0 if causal else torch.ones_like(near, dtype=torch.bool)
        if window:
            sees = sees & (near < window)
        if q_in is not None:
            sees = sees & (q_in[:, queries, None] == k_in[:, None]) & (q_in[:, queries, None] >= 0)
        seen = sees.any(1).any(0).nonzero()
        if len(seen):
            keys = slice(int(seen[0]), int(seen[-1]) + 1)
            yield queries, keys, sees[:, :, keys]


def _grouped(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, K) as (B, G, T, H / G, K)."""
    return x.to(dtype).unflatten(2, (groups, -1)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """`_grouped` undone."""
    return x.transpose(1, 2).flatten(2, 3)


def _logits(q: Tensor, k: Tensor, sees: Tensor, scale: float) -> Tensor:
    """(B, G, queries, heads of a group, keys), -inf at what is not seen."""
    logits = (q.flatten(2, 3) @ k.transpose(-1, -2)).view(*q.shape[:4], -1) * scale
    return logits.masked_fill(~sees[:, None, :, None], -torch.inf)
