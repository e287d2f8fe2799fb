"""The selective scan for CPUs, by blocks of time: a state for every token exists for one block at a time.

Any algorithm for the elementwise recurrence does inside a block; the one by chunks, `kernels.scan`, is the fastest.
Backward makes the states of each block again from the one that entered it, from the last block to the first.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import segments
from kernels.scan import scan as by_chunks
from kernels.selective_scan.cumsum import cumsum
from kernels.selective_scan.hillis_steele import hillis_steele

STATES = 2**19  # numbers in the states of a block: they stay in a core's cache

SCANS = {
    "chunked": lambda log_a, a, x, start, reverse: by_chunks(a, x, start, reverse),
    "cumsum": cumsum,
    "hillis_steele": hillis_steele,
}


def chunked(
    x_BTD: Tensor,
    step_BTD: Tensor,
    a_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    d_D: Tensor | None,
    state_BDN: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
    scan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`; then, for `grad`, the states that entered the blocks, (n, B, D*N)."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    rows, tokens, _ = x_BTD.shape
    real_BT1, begins_BT1 = _marks(segments_BT)
    x, step, b, c = (_real(v.to(wide), real_BT1) for v in (x_BTD, step_BTD, b_BTN, c_BTN))
    a = a_DN.to(wide)
    h = x.new_zeros(rows, a.numel()) if state_BDN is None else state_BDN.to(wide).flatten(1)
    outputs, entered, last = [], [], [h[:, None]]
    for block in blocks(x, a):
        entered.append(h)
        log_a, decay, added = _factors(x, step, a, b, begins_BT1, block)
        line = SCANS[scan](log_a, decay, added, h, False)
        h = line[:, -1]
        outputs.append((line.unflatten(2, a.shape) @ c[:, block, :, None])[..., 0])
        last.append(line[:, max(tokens - keep - 1 - block.start, 0) :])
    y = torch.cat(outputs, 1) if outputs else x
    y = _real(y if d_D is None else y + d_D.to(wide) * x, real_BT1)
    state = torch.cat(last, 1)[:, -keep - 1 :].unflatten(2, a.shape) if keep else h.unflatten(1, a.shape)
    return y.to(x_BTD.dtype), state, torch.stack(entered) if entered else x.new_empty(0, rows, a.numel())


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """With g_t all that h_t gets, g_t = C_t dy_t + exp(step_{t+1} A) g_{t+1}, and e_t = g_t exp(step_t A) h_{t-1}:

    dA = sum e step, dstep = sum_n e A + x sum_n g B, dx = step sum_n g B + D dy, dB = sum_d g step x, dC = sum_d h dy.
    """
    x_BTD, step_BTD, a_DN, b_BTN, c_BTN, d_D, state_BDN, segments_BT, keep, scan = args
    entered = outputs[0]
    wide = entered.dtype
    real_BT1, begins_BT1 = _marks(segments_BT)
    x, step, b, c, dy = (_real(v.to(wide), real_BT1) for v in (x_BTD, step_BTD, b_BTN, c_BTN, grads[0]))
    a, tokens = a_DN.to(wide), x.shape[1]
    dmoments = grads[1].to(wide).flatten(-2)
    dmoments = dmoments if keep else dmoments[:, None]
    dx, dstep, db, dc = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, step, b, c))
    da, carry = torch.zeros_like(a), torch.zeros_like(dmoments[:, 0])
    for n, block in reversed(list(enumerate(blocks(x, a)))):
        log_a, decay, added = _factors(x, step, a, b, begins_BT1, block)
        h = SCANS[scan](log_a, decay, added, entered[n], False)
        g = (dy[:, block, :, None] * c[:, block, None]).flatten(2)
        first = max(block.start, tokens - keep - 1)  # the first token of the block whose state was returned
        if first < block.stop:
            moment = first - (tokens - keep - 1)
            g[:, first - block.start :] += dmoments[:, moment : moment + block.stop - first]
        g[:, -1] += carry
        later = (torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], 1) for v in (log_a, decay))
        g = SCANS[scan](*later, g, torch.zeros_like(carry), True)
        carry = decay[:, 0] * g[:, 0]
        e = decay.mul_(g)
        e[:, 1:] *= h[:, :-1]
        e[:, 0] *= entered[n]
        e, g, h = (v.unflatten(2, a.shape) for v in (e, g, h))
        step_, x_ = step[:, block], x[:, block]
        da += (e * step_[..., None]).sum((0, 1))
        of_write = (g @ b[:, block, :, None])[..., 0]
        dx[:, block] = of_write * step_
        dstep[:, block] = torch.einsum("btdn,dn->btd", e, a).addcmul_(of_write, x_)
        db[:, block] = ((step_ * x_)[:, :, None] @ g)[:, :, 0]
        dc[:, block] = (dy[:, block, None] @ h)[:, :, 0]
    if keep == tokens:
        carry = carry + dmoments[:, 0]
    if d_D is not None:
        dx.addcmul_(dy, d_D.to(wide))
    dstep = _real(dstep, real_BT1)
    dd = None if d_D is None else (dy * x).sum((0, 1))
    found = (dx, dstep, da, db, dc, dd, carry.unflatten(1, a.shape))
    return [g.to(arg.dtype) for g, arg, need in zip(found, args, needs, strict=False) if need]


def blocks(x: Tensor, a: Tensor) -> Iterator[slice]:
    """Stretches of time."""
    tokens = x.shape[1]
    size = min(512, max(32, STATES // max(1, x.shape[0] * a.numel())))
    for first in range(0, tokens, size):
        yield slice(first, min(first + size, tokens))


def _marks(segments_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if segments_BT is None:
        return None, None
    return (segments_BT >= 0)[..., None], segments.begins(segments.filled(segments_BT))[..., None]


def _real(v: Tensor, real_BT1: Tensor | None) -> Tensor:
    """v with 0 at padding: a step of 0 changes no state, and what was there, NaN it may be, is in no product."""
    return v if real_BT1 is None else torch.where(real_BT1, v, 0)


def _factors(x, step, a, b, begins_BT1, block: slice) -> tuple[Tensor, Tensor, Tensor]:
    """What a block's states decay by, as logarithm and as such, and what is added, (B, S, D*N) each."""
    step = step[:, block]
    log_a = (step[..., None] * a).flatten(2)
    if begins_BT1 is not None:
        log_a = log_a.masked_fill(begins_BT1[:, block], -torch.inf)
    return log_a, log_a.exp(), ((step * x[:, block])[..., None] * b[:, block, None]).flatten(2)
