"""WKV of RWKV-4 on a GPU: a program walks a block of channels of one row through time, its sums in registers.

Forward leaves the state around every token for backward, which walks the other way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.diagonal_scan.triton import kinds
from kernels.launch import launch
from kernels.wkv4.reference import FRESH

SAVED = 1  # the states around every token
BLOCK = 32  # channels of a program: many programs, since each is one long chain


def forward(
    k_BTD: Tensor,
    v_BTD: Tensor,
    decay_D: Tensor,
    bonus_D: Tensor,
    state_B3D: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`; then, for `grad`, the states around every token (B, T+1, 3, D) fp32."""
    k, v, decay, bonus = (x.contiguous() for x in (k_BTD, v_BTD, decay_D, bonus_D))
    rows, tokens, size = k.shape
    states = torch.empty(rows, tokens + 1, 3, size, dtype=torch.float32, device=k.device)
    if state_B3D is None:
        states[:, 0, :2], states[:, 0, 2] = 0, FRESH
    else:
        states[:, 0] = state_B3D
    y = torch.empty_like(v)
    launch(
        _forward, (rows * triton.cdiv(size, BLOCK),), k, v, decay, bonus, kinds(segments_BT), y, states,
        tokens, size, BLOCK, FRESH, num_warps=1,
    )  # fmt: skip
    return y, (states[:, tokens - keep :] if keep else states[:, tokens]).clone(), states


def fake(k_BTD, v_BTD, decay_D, bonus_D, state_B3D, segments_BT, keep):
    rows, tokens, size = k_BTD.shape
    y = torch.empty_like(v_BTD, memory_format=torch.contiguous_format)
    state = v_BTD.new_empty(rows, *((keep + 1,) if keep else ()), 3, size, dtype=torch.float32)
    return y, state, v_BTD.new_empty(rows, tokens + 1, 3, size, dtype=torch.float32)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """By one walk back."""
    k_BTD, v_BTD, decay_D, bonus_D, state_B3D, segments_BT, keep = args
    k, v, decay, bonus = (x.contiguous() for x in (k_BTD, v_BTD, decay_D, bonus_D))
    states = outputs[0]
    rows, tokens, size = k.shape
    dy, dmoments = grads[0].contiguous(), grads[1].contiguous()
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    ddecay, dbonus = (k.new_empty(rows, size, dtype=torch.float32) for _ in range(2))
    dstart = k.new_empty(rows, 3, size, dtype=torch.float32)
    launch(
        _backward, (rows * triton.cdiv(size, BLOCK),), k, v, decay, bonus, kinds(segments_BT), states, dy, dmoments,
        dk, dv, ddecay, dbonus, dstart, tokens, keep, size, BLOCK, FRESH, num_warps=1,
    )  # fmt: skip
    found = (dk, dv, ddecay.sum(0).to(decay_D.dtype), dbonus.sum(0).to(bonus_D.dtype), dstart)
    found = (*found[:4], None if state_B3D is None else dstart.to(state_B3D.dtype))
    return [g for g, need in zip(found, needs, strict=False) if need]


@triton.jit
def _forward(
    k, v, decay, bonus, kind, y, states, tokens, D: tl.constexpr, BLOCK: tl.constexpr, FRESH: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) // tl.cdiv(D, BLOCK)).to(tl.int64)
    d = (tl.program_id(0) % tl.cdiv(D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    w = tl.load(decay + d, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(bonus + d, mask=inside, other=0.0).to(tl.float32)
    at = row * (tokens + 1) * 3 * D + d
    a = tl.load(states + at, mask=inside, other=0.0)
    b = tl.load(states + at + D, mask=inside, other=1.0)
    m = tl.load(states + at + 2 * D, mask=inside, other=0.0)
    for t in range(0, tokens):
        place = (row * tokens + t) * D + d
        which = 0
        if kind is not None:
            which = tl.load(kind + row * tokens + t).to(tl.int32)
        kt = tl.load(k + place, mask=inside, other=0.0).to(tl.float32)
        vt = tl.load(v + place, mask=inside, other=0.0).to(tl.float32)
        if kind is not None:
            kt, vt = tl.where(which == 2, 0.0, kt), tl.where(which == 2, 0.0, vt)
            a = tl.where(which == 1, 0.0, a)
            b = tl.where(which == 1, 0.0, b)
            m = tl.where(which == 1, FRESH, m)
        most = tl.maximum(m, u + kt)
        past, now = tl.exp(m - most), tl.exp(u + kt - most)
        out = (past * a + now * vt) / (past * b + now)
        after = tl.maximum(m + w, kt)
        past, now = tl.exp(m + w - after), tl.exp(kt - after)
        if kind is not None:
            out = tl.where(which == 2, 0.0, out)
            past, now = tl.where(which == 2, 1.0, past), tl.where(which == 2, 0.0, now)
            after = tl.where(which == 2, m, after)
        a, b, m = past * a + now * vt, past * b + now, after
        tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)
        at += 3 * D
        tl.store(states + at, a, mask=inside)
        tl.store(states + at + D, b, mask=inside)
        tl.store(states + at + 2 * D, m, mask=inside)


@triton.jit
def _backward(
    k, v, decay, bonus, kind, states, dy, dmoments, dk, dv, ddecay, dbonus, dstart, tokens, keep,
    D: tl.constexpr, BLOCK: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tl.cdiv(D, BLOCK)).to(tl.int64)
    d = (tl.program_id(0) % tl.cdiv(D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    w = tl.load(decay + d, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(bonus + d, mask=inside, other=0.0).to(tl.float32)
    of_w = tl.zeros((BLOCK,), tl.float32)
    of_u = tl.zeros((BLOCK,), tl.float32)
    moment = row * (keep + 1) * 3 * D + d
    ga = tl.load(dmoments + moment + keep * 3 * D, mask=inside, other=0.0)
    gb = tl.load(dmoments + moment + keep * 3 * D + D, mask=inside, other=0.0)
    gm = tl.load(dmoments + moment + keep * 3 * D + 2 * D, mask=inside, other=0.0)
    for back in range(0, tokens):
        t = tokens - 1 - back
        place = (row * tokens + t) * D + d
        which = 0
        if kind is not None:
            which = tl.load(kind + row * tokens + t).to(tl.int32)
        kt = tl.load(k + place, mask=inside, other=0.0).to(tl.float32)
        vt = tl.load(v + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        at = (row * (tokens + 1) + t) * 3 * D + d
        a = tl.load(states + at, mask=inside, other=0.0)
        b = tl.load(states + at + D, mask=inside, other=1.0)
        m = tl.load(states + at + 2 * D, mask=inside, other=0.0)
        if kind is not None:
            kt, vt, g = tl.where(which == 2, 0.0, kt), tl.where(which == 2, 0.0, vt), tl.where(which == 2, 0.0, g)
            a = tl.where(which == 1, 0.0, a)
            b = tl.where(which == 1, 0.0, b)
            m = tl.where(which == 1, FRESH, m)
        # Of the output; what passes through the largest exponent cancels.
        most = tl.maximum(m, u + kt)
        past, now = tl.exp(m - most), tl.exp(u + kt - most)
        down = past * b + now
        dnum = g / down
        dden = -dnum * (past * a + now * vt) / down
        da, db, dm = dnum * past, dden * past, (dnum * a + dden * b) * past
        dnow = (dnum * vt + dden) * now
        found_v = dnum * now
        # Of the state after.
        after = tl.maximum(m + w, kt)
        past, now = tl.exp(m + w - after), tl.exp(kt - after)
        dpast, dgiven = (ga * a + gb * b) * past, (ga * vt + gb) * now
        dafter = gm - dpast - dgiven
        share = tl.where(m + w > kt, 1.0, tl.where(m + w < kt, 0.0, 0.5))  # as torch.maximum divides it
        dpast += dafter * share
        found_k = dnow + dgiven + dafter * (1.0 - share)
        found_v += ga * now
        da, db, dm = da + ga * past, db + gb * past, dm + dpast
        if kind is not None:
            found_k, found_v = tl.where(which == 2, 0.0, found_k), tl.where(which == 2, 0.0, found_v)
            dnow, dpast = tl.where(which == 2, 0.0, dnow), tl.where(which == 2, 0.0, dpast)
            da, db, dm = tl.where(which == 1, 0.0, da), tl.where(which == 1, 0.0, db), tl.where(which == 1, 0.0, dm)
            da, db, dm = tl.where(which == 2, ga, da), tl.where(which == 2, gb, db), tl.where(which == 2, gm, dm)
        tl.store(dk + place, found_k.to(dk.dtype.element_ty), mask=inside)
        tl.store(dv + place, found_v.to(dv.dtype.element_ty), mask=inside)
        of_u += dnow
        of_w += dpast
        ga, gb, gm = da, db, dm
        if t - tokens + keep >= 0:
            here = dmoments + moment + (t - tokens + keep) * 3 * D
            ga += tl.load(here, mask=inside, other=0.0)
            gb += tl.load(here + D, mask=inside, other=0.0)
            gm += tl.load(here + 2 * D, mask=inside, other=0.0)
    tl.store(ddecay + row * D + d, of_w, mask=inside)
    tl.store(dbonus + row * D + d, of_u, mask=inside)
    tl.store(dstart + row * 3 * D + d, ga, mask=inside)
    tl.store(dstart + row * 3 * D + D + d, gb, mask=inside)
    tl.store(dstart + row * 3 * D + 2 * D + d, gm, mask=inside)
