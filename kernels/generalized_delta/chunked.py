"""The generalised delta rule in chunks: a triangular system inside a chunk, a short loop over the state between them.

With g the sum of decays since the chunk's start (per key channel) and S the state there, what a asks the memory before
token t, u_t, solves

    u_t - sum_{i<t} (a_t . e^(g_{t-1} - g_i) b_i) u_i = S^T (e^(g_{t-1}) a_t) + sum_{i<t} (a_t . e^(g_{t-1} - g_i) k_i) v_i

and the output is y_t = S^T (e^(g_t) q_t) + sum_{i<=t} (q_t . e^(g_t - g_i) k_i) v_i + (q_t . e^(g_t - g_i) b_i) u_i.
Decays differ by channel, so each pair of tokens has its own factors: chunks are short. Only differences of g on or
below the diagonal are exponentiated, so nothing overflows. A document's start and padding are masks on those factors.
"""

import torch
from torch import Tensor

from kernels import segments
from kernels.chunks import FLOOR, STEPS, documents, split

CHUNK = 16  # tokens of a chunk, at most


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
    size = min(CHUNK, tokens)
    q, k, v, decay, a, b = (split(x, size) for x in (q, k, v, decay, a, b))  # (B, H, n, C, ...)
    g = decay.double().cumsum(-2)  # differences of long sums: the double keeps small ones exact
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    between = (g[..., :, None, :] - g[..., None, :, :]).to(q.dtype).masked_fill(~lower[..., None], -torch.inf).exp()
    # Of each t and i <= t: what the queries of token t and the a of token t + 1 find of k_i and b_i.
    ask = torch.stack([q, torch.cat([a[..., 1:, :], torch.zeros_like(a[..., :1, :])], -2)], -1)  # (..., t, K, 2)
    of_k, of_b = (between * k[..., None, :, :]) @ ask, (between * b[..., None, :, :]) @ ask  # (..., t, i, 2)
    q_k, q_b = of_k[..., 0], of_b[..., 0]
    a_k, a_b = (torch.cat([torch.zeros_like(x[..., :1, :, 1]), x[..., :-1, :, 1]], -2) for x in (of_k, of_b))
    q_since, a_since = q * g.exp().to(q.dtype), a * (g - decay).exp().to(q.dtype)
    until, across = (g[..., -1:, :] - g).exp().to(q.dtype), g[..., -1, :].exp().to(q.dtype)
    if number_BT is not None:
        same, past, future = documents(number_BT, size)
        q_k, q_b, a_k, a_b = (x * same for x in (q_k, q_b, a_k, a_b))
        q_since, a_since = q_since * past[..., None], a_since * past[..., None]
        until, across = until * future[..., None], across * past[..., -1:]
    right = torch.cat([a_k @ v, a_since], -1)
    solved = torch.linalg.solve_triangular(-a_b, right, upper=False, unitriangular=True)
    found, asks = solved.split([v.shape[-1], k.shape[-1]], -1)  # u = found + asks S
    k_until, b_until = ((x * until).transpose(-1, -2) for x in (k, b))
    writes = k_until @ v
    starts, us = [], []
    for n in range(q.shape[2]):
        starts.append(state)
        u = found[:, :, n] + asks[:, :, n] @ state
        us.append(u)
        state = across[:, :, n, :, None] * state + writes[:, :, n] + b_until[:, :, n] @ u
    y = q_since @ torch.stack(starts, 2) + q_k @ v + q_b @ torch.stack(us, 2)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens], state
