"""WKV of RWKV-4 for CPUs, without a loop over tokens: three scans.

The largest exponents m_t are a scan of max(m + w, k). Which of the two it was is all that has to be known to write them
as a linear scan, which autograd can go through. With the m_t known, the two sums over e^m are linear scans of factors
that are at most 1. Long sequences go span by span, so that what a span needs stays in a core's cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import op, segments
from kernels.scan import MaxPlus, scan, walk
from kernels.wkv4.reference import FRESH, step

STEPS = 4  # calls of so few tokens walk them
SPAN = 2**17  # numbers of a tensor that are scanned at a time: what a core's cache holds a dozen of


def chunked(
    k_BTD: Tensor,
    v_BTD: Tensor,
    decay_D: Tensor,
    bonus_D: Tensor,
    state_B3D: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`; then, for `grad`, the states that entered the spans of time, (n, B, 3, D)."""
    wide = torch.promote_types(v_BTD.dtype, torch.float32)
    k, v, decay, bonus = (x.to(wide) for x in (k_BTD, v_BTD, decay_D, bonus_D))
    rows, tokens, size = k.shape
    if state_B3D is None:
        state = k.new_tensor([0.0, 0.0, FRESH])[:, None].repeat(rows, 1, size)
    else:
        state = state_B3D.to(wide)
    begins, real = _marks(segments_BT)
    if tokens <= STEPS and real is None:
        y, states = _few(*state.unbind(1), k, v, decay, bonus)
        after = states[:, tokens - keep :] if keep else states[:, tokens]
        return y.to(v_BTD.dtype), after, state[None, : rows * bool(tokens)].clone()
    outputs, entered, last = [], [], [state[:, None]]
    for span in spans(k):
        entered.append(state)
        marks = (None, None) if real is None else (begins[:, span], real[:, span])
        y, states = _scans(*state.unbind(1), k[:, span], v[:, span], decay, bonus, *marks)
        state = states[:, -1]
        outputs.append(y)
        last.append(states[:, max(tokens - keep - 1 - span.start, 0) :])
    y = torch.cat(outputs, 1) if outputs else v
    after = torch.cat(last, 1)[:, -keep - 1 :] if keep else state
    return y.to(v_BTD.dtype), after, torch.stack(entered) if entered else k.new_empty(0, rows, 3, size)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """Span by span from the last: its scans again with recording on, and back through them."""
    k_BTD, v_BTD, decay_D, bonus_D, state_B3D, segments_BT, keep = args
    entered = outputs[0]
    wide, tokens = entered.dtype, k_BTD.shape[1]
    k, v, decay, bonus = (x.to(wide) for x in args[:4])
    begins, real = _marks(segments_BT)
    dmoments = grads[1].to(wide) if keep else grads[1].to(wide)[:, None]
    carry, dk, dv = dmoments.new_zeros(dmoments[:, 0].shape), [], []
    of_decay, of_bonus = torch.zeros_like(decay), torch.zeros_like(bonus)
    for n, span in reversed(list(enumerate(spans(k)))):
        marks = (None, None) if real is None else (begins[:, span], real[:, span])
        with op.recording():
            leaves = [x.detach().requires_grad_() for x in (entered[n], k[:, span], v[:, span], decay, bonus)]
            y, states = _scans(*leaves[0].unbind(1), *leaves[1:], *marks)
            dstates = torch.zeros_like(states)
            first = max(span.start, tokens - keep - 1)  # the first token of the span whose state was returned
            if first < span.stop:
                moment = first - (tokens - keep - 1)
                dstates[:, first - span.start :] = dmoments[:, moment : moment + span.stop - first]
            dstates[:, -1] += carry
            carry, *found = torch.autograd.grad([y, states], leaves, [grads[0][:, span].to(wide), dstates])
        dk.append(found[0])
        dv.append(found[1])
        of_decay += found[2]
        of_bonus += found[3]
    if keep == tokens:
        carry = carry + dmoments[:, 0]
    made = (torch.cat(dk[::-1], 1) if dk else k, torch.cat(dv[::-1], 1) if dv else v, of_decay, of_bonus, carry)
    return [g.to(x.dtype) for g, x, need in zip(made, args, needs, strict=False) if need]


def spans(k_BTD: Tensor) -> Iterator[slice]:
    """Stretches of time."""
    rows, tokens, size = k_BTD.shape
    length = max(256, SPAN // max(1, rows * size))
    for start in range(0, tokens, length):
        yield slice(start, min(start + length, tokens))


def _marks(segments_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where documents begin and where tokens are real, (B, T, 1) bool each."""
    if segments_BT is None:
        return None, None
    return segments.begins(segments.filled(segments_BT))[..., None], (segments_BT >= 0)[..., None]


def _few(a, b, m, k, v, decay, bonus) -> tuple[Tensor, Tensor]:
    states, outputs = [torch.stack([a, b, m], 1)], []
    for t in range(k.shape[1]):
        y, after = step(*states[-1].unbind(1), k[:, t], v[:, t], decay, bonus)
        states.append(after)
        outputs.append(y)
    return torch.stack(outputs, 1) if outputs else v, torch.stack(states, 1)


def _scans(a, b, m, k, v, decay, bonus, begins, real) -> tuple[Tensor, Tensor]:
    """y (B, T, D), and the states (B, T, 3, D) after each token."""
    slope = decay.expand_as(k)
    given = k
    if real is not None:
        k, v = torch.where(real, k, 0), torch.where(real, v, 0)
        slope = torch.where(real, slope, 0).masked_fill(begins, FRESH)
        given = torch.where(real, k, FRESH)
    with torch.no_grad():
        most = walk(MaxPlus, slope.detach(), given.detach(), m.detach(), torch.empty_like(k))
        before = torch.cat([m[:, None], most[:, :-1]], 1)
        on = before + slope >= given  # the past has the largest exponent, not the token
        on = on if begins is None else on & ~begins
    if torch.is_grad_enabled():
        passed = torch.where(on, slope, given)
        if begins is not None:
            passed = passed.masked_fill(begins & ~real, FRESH)
        most = scan(on.to(k.dtype), passed, m)
    before = torch.cat([m[:, None], most[:, :-1]], 1)
    factor, weight = (before + slope - most).exp(), (given - most).exp()
    if begins is not None:
        factor, weight = torch.where(real, factor, 1).masked_fill(begins, 0), torch.where(real, weight, 0)
    sums = scan(torch.cat([factor, factor], -1), torch.cat([weight * v, weight], -1), torch.cat([a, b], -1))
    states = torch.cat([sums, most], -1).unflatten(-1, (3, -1))
    a, b, m = torch.cat([torch.stack([a, b, m], 1)[:, None], states[:, :-1]], 1).unbind(2)
    if begins is not None:
        a, b, m = a.masked_fill(begins, 0), b.masked_fill(begins, 0), m.masked_fill(begins, FRESH)
    now = bonus + k
    most = torch.maximum(m, now)
    past, now = (m - most).exp(), (now - most).exp()
    y = (past * a + now * v) / (past * b + now)
    return y if real is None else torch.where(real, y, 0), states
