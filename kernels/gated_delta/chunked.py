"""The gated delta rule in chunks: within a chunk a triangular system, between chunks a short loop over the state.

With g the sum of decays since the chunk's start and S the state there, what token t writes, u_t, solves

    u_t + sum_{i<t} beta_t e^(g_t - g_i) (k_t . k_i) u_i = beta_t v_t - beta_t e^(g_t) S^T k_t

so U = A^-1 (beta V) - A^-1 (beta e^g K) S, and both solutions come before S is known, for all chunks at once.
Only differences of g below the diagonal are exponentiated, so nothing overflows. A document's start and padding are
masks on those factors: what lies in another document has factor 0.
"""

import torch
from torch import Tensor

from kernels import segments

CHUNK = 64  # tokens of a chunk, at most
FLOOR = -200.0  # exp(FLOOR) is 0 next to 1 in any dtype; keeps a decay of -inf from making inf - inf
STEPS = 4  # calls of so few tokens walk them


def chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """As `reference`; padding's output is 0."""
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    rows, tokens, heads, size = q_BTHK.shape
    decay, beta = decay_BTH.to(wide).clamp(min=FLOOR), beta_BTH.to(wide)
    number_BT = None
    if segments_BT is not None:
        real_BT1 = (segments_BT >= 0)[..., None]
        decay, beta = torch.where(real_BT1, decay, 0), torch.where(real_BT1, beta, 0)
        number_BT = segments.filled(segments_BT)
    if state_BHKV is None:
        state = torch.zeros(rows, heads, size, v_BTHV.shape[3], dtype=wide, device=v_BTHV.device)
    else:
        state = state_BHKV.to(wide)
    q, k, v = q_BTHK.to(wide) * scale, k_BTHK.to(wide), v_BTHV.to(wide)
    walked = tokens if tokens <= STEPS else keep
    outputs, moments = [], []
    if tokens > walked:
        n = tokens - walked
        head = None if number_BT is None else number_BT[:, :n]
        y, state = _chunks(q[:, :n], k[:, :n], v[:, :n], decay[:, :n], beta[:, :n], state, head)
        outputs.append(y)
    begins_BT = None if number_BT is None else segments.begins(number_BT)
    for t in range(tokens - walked, tokens + 1):
        if t >= tokens - keep:
            moments.append(state)
        if t < tokens:
            if begins_BT is not None:
                state = torch.where(begins_BT[:, t, None, None, None], 0, state)
            state = state * decay[:, t, :, None, None].exp()
            error_BH1V = v[:, t, :, None] - k[:, t, :, None] @ state
            state = state + (k[:, t] * beta[:, t, :, None])[..., None] * error_BH1V
            outputs.append((q[:, t, :, None] @ state).transpose(1, 2))
    y = torch.cat(outputs, 1) if outputs else v
    if segments_BT is not None:
        y = torch.where(real_BT1[..., None], y, 0)
    after = torch.stack(moments, 1) if keep else moments[0]
    return y.to(v_BTHV.dtype), after


def _chunks(q, k, v, decay, beta, state, number_BT) -> tuple[Tensor, Tensor]:
    """At least one token, by chunks; all in one dtype, padding with decay and beta 0, q scaled."""
    tokens = q.shape[1]
    # More tokens than key dimensions make an ill-conditioned system where little decays, and gain nothing.
    size = min(CHUNK, tokens, max(16, 1 << (q.shape[-1] - 1).bit_length()))
    q, k, v, decay, beta = (_split(x, size) for x in (q, k, v, decay, beta))  # (B, H, n, C, ...)
    g = decay.double().cumsum(-1)  # differences of long sums: the double keeps small ones exact
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    past = future = None
    if number_BT is not None:
        number = _split(number_BT, size, edge=True)[:, None]  # (B, 1, n, C)
        ends = number[..., -1:]
        before = torch.cat([torch.zeros_like(ends[:, :, :1]), ends[:, :, :-1]], 2)
        lower = lower & (number[..., :, None] == number[..., None, :])
        past, future = number == before, number == ends
    between = (g[..., :, None] - g[..., None, :]).masked_fill(~lower, -torch.inf).exp().to(q.dtype)
    since = g.exp().to(q.dtype)  # from the chunk's start to t
    until = (g[..., -1:] - g).exp().to(q.dtype)  # from t to the chunk's end
    if past is not None:
        since, until = since * past, until * future
    across = since[..., -1]  # of the whole chunk
    system = (k @ k.transpose(-1, -2)) * between * beta[..., None]
    right = torch.cat([v * beta[..., None], k * (beta * since)[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    write, forget = solved.split([v.shape[-1], k.shape[-1]], -1)
    keys = (k * until[..., None]).transpose(-1, -2)
    starts, writes = [], []
    # unbind, not indexing: its gradient is one stack, where each index would fill a whole tensor with zeros.
    parts = (x.unbind(2) for x in (write, forget, keys, across[..., None, None]))
    for write_n, forget_n, keys_n, across_n in zip(*parts, strict=True):
        starts.append(state)
        u = write_n - forget_n @ state
        writes.append(u)
        state = across_n * state + keys_n @ u
    y = (q * since[..., None]) @ torch.stack(starts, 2)
    y = y + ((q @ k.transpose(-1, -2)) * between) @ torch.stack(writes, 2)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens], state


def _split(x: Tensor, size: int, edge: bool = False) -> Tensor:
    """(B, T, H, ...) -> (B, H, n, C, ...), or (B, T) -> (B, n, C); filled up with zeros, or the last column."""
    short = -x.shape[1] % size
    if short:
        fill = x[:, -1:].expand(-1, short) if edge else x.new_zeros(x.shape[0], short, *x.shape[2:])
        x = torch.cat([x, fill], 1)
    x = x.unflatten(1, (-1, size))
    return x if x.dim() == 3 else x.movedim(3, 1).contiguous()
