"""The generalised delta rule in chunks: a triangular system inside a chunk, a short loop over the state between them.

With g the sum of decays since the chunk's start (per key channel) and S the state there, what a asks the memory before
token t, u_t, solves

    u_t = S^T (e^(g_{t-1}) a_t) + sum_{i<t} (a_t . e^(g_{t-1} - g_i) k_i) v_i + (a_t . e^(g_{t-1} - g_i) b_i) u_i

and the output is y_t = S^T (e^(g_t) q_t) + sum_{i<=t} (q_t . e^(g_t - g_i) k_i) v_i + (q_t . e^(g_t - g_i) b_i) u_i.
Decays differ by channel and e^(-g_i) alone may overflow, so products of pairs of tokens are made in levels: two
neighbouring runs of 1, 2, 4 ... tokens meet at their border, decayed from i to the border and from the border to t.
Each level is one batch of matrix products, and decays are only ever multiplied, so nothing overflows or cancels.
A document's start and padding are masks on the results.
"""

import torch
from torch import Tensor

from kernels import segments
from kernels.chunks import FLOOR, STEPS, documents, split

CHUNK = 32  # tokens of a chunk, at most; a power of 2


def chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """As `reference`; padding's output is 0."""
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    rows, tokens, heads, size = q_BTHK.shape
    q, k, v, a, b = (x.to(wide) for x in (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK))
    q, decay = q * scale, decay_BTHK.to(wide).clamp(min=FLOOR)
    number_BT = begins_BT = None
    if segments_BT is not None:
        real_BT11 = (segments_BT >= 0)[..., None, None]
        k, b, decay = (torch.where(real_BT11, x, 0) for x in (k, b, decay))
        number_BT = segments.filled(segments_BT)
        begins_BT = segments.begins(number_BT)
    state = v.new_zeros(rows, heads, size, v.shape[3]) if state_BHKV is None else state_BHKV.to(wide)
    walked = tokens if tokens <= STEPS else keep
    outputs, moments = [], []
    if tokens > walked:
        n = tokens - walked
        number = None if number_BT is None else number_BT[:, :n]
        y, state = _chunks(*(x[:, :n] for x in (q, k, v, decay, a, b)), state, number)
        outputs.append(y)
    for t in range(tokens - walked, tokens + 1):
        if t >= tokens - keep:
            moments.append(state)
        if t < tokens:
            if begins_BT is not None:
                state = torch.where(begins_BT[:, t, None, None, None], 0, state)
            u_BH1V = a[:, t, :, None] @ state
            state = state * decay[:, t, :, :, None].exp() + b[:, t, :, :, None] * u_BH1V
            state = state + k[:, t, :, :, None] * v[:, t, :, None]
            outputs.append((q[:, t, :, None] @ state).transpose(1, 2))
    y = torch.cat(outputs, 1) if outputs else v
    if segments_BT is not None:
        y = torch.where(real_BT11, y, 0)
    return y.to(v_BTHV.dtype), torch.stack(moments, 1) if keep else moments[0]


def _chunks(q, k, v, decay, a, b, state, number_BT) -> tuple[Tensor, Tensor]:
    """At least one token, by chunks; all in one dtype, padding with decay, k and b 0, q scaled."""
    tokens = q.shape[1]
    # More tokens than key dimensions make an ill-conditioned system where little decays, and gain nothing.
    size = min(CHUNK, _power(tokens), max(16, _power(q.shape[-1])))
    q, k, v, decay, a, b = (split(x, size) for x in (q, k, v, decay, a, b))  # (B, H, n, C, ...)
    (q_k, q_b, a_k, a_b), (q_since, a_since), (k_until, b_until), across = _pairs(q, k, a, b, decay.exp())
    if number_BT is not None:
        same, past, future = documents(number_BT, size)
        q_k, q_b, a_k, a_b = (x * same for x in (q_k, q_b, a_k, a_b))
        q_since, a_since, across = (x * past[..., -x.shape[-2] :, None] for x in (q_since, a_since, across))
        k_until, b_until = (x * future[..., None] for x in (k_until, b_until))
    right = torch.cat([a_k @ v, a_since], -1)
    solved = torch.linalg.solve_triangular(-a_b, right, upper=False, unitriangular=True)
    found, asks = solved.split([v.shape[-1], k.shape[-1]], -1)  # u = found + asks S
    across, b_until = across.transpose(-1, -2), b_until.transpose(-1, -2)
    writes = k_until.transpose(-1, -2) @ v
    starts, us = [], []
    for n in range(q.shape[2]):
        starts.append(state)
        u = found[:, :, n] + asks[:, :, n] @ state
        us.append(u)
        state = across[:, :, n] * state + writes[:, :, n] + b_until[:, :, n] @ u
    y = q_since @ torch.stack(starts, 2) + q_k @ v + q_b @ torch.stack(us, 2)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens], state


def _pairs(q, k, a, b, gate) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Every product of two tokens of a chunk of C, a power of 2.

    q_k, q_b (B, H, n, C, C): of t and i <= t, what q_t finds of k_i and b_i; a_k, a_b: of t and i < t, what a_t does.
    Then q and a decayed from the chunk's start, k and b decayed to its end (B, H, n, C, K), and the whole chunk's
    decay (B, H, n, 1, K).
    """
    own = torch.stack([(q * k).sum(-1), (q * b).sum(-1)], -1)
    pairs = torch.stack([own, torch.zeros_like(own)], -2)[..., None, None]  # (B, H, n, runs, q a, k b, t, i)
    since = torch.stack([q * gate, a], -2)[..., None, :]  # (B, H, n, runs, q a, t, K), from the run's start
    until = torch.stack([k, b], -2)[..., None, :]  # (B, H, n, runs, k b, i, K), to the run's end
    across = gate[..., None, None, :]  # (B, H, n, runs, 1, 1, K), of the whole run
    while since.shape[3] > 1:
        (since1, since2), (until1, until2), (across1, across2), (first, second) = (
            x.unflatten(3, (-1, 2)).unbind(4) for x in (since, until, across, pairs)
        )
        run = since.shape[-2]
        met = since2.flatten(-3, -2) @ until1.flatten(-3, -2).transpose(-1, -2)
        met = met.unflatten(-2, (2, run)).unflatten(-1, (2, run)).transpose(-3, -2)
        pairs = torch.cat([torch.cat([first, torch.zeros_like(first)], -1), torch.cat([met, second], -1)], -2)
        since = torch.cat([since1, since2 * across1], -2)
        until = torch.cat([until1 * across2, until2], -2)
        across = across1 * across2
    pairs, since, until = pairs[:, :, :, 0], since[:, :, :, 0], until[:, :, :, 0]
    return pairs.flatten(3, 4).unbind(3), since.unbind(3), until.unbind(3), across[:, :, :, 0, 0]


def _power(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()
