"""Linear attention in chunks: masked attention inside a chunk, a short loop over the state between chunks.

With g the sum of decays since the chunk's start and S the state there,

    y_t = e^(g_t) S^T q_t + sum_{i<=t} e^(g_t - g_i) (q_t . k_i) v_i

Only differences of g on or below the diagonal are exponentiated, so nothing overflows. A document's start and padding
are masks on those factors.
"""

import torch
from torch import Tensor

from kernels import segments
from kernels.chunks import FLOOR, STEPS, documents, split

CHUNK = 64  # tokens of a chunk, at most


def chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTH: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """As `reference`; padding's output is 0."""
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    rows, tokens, heads, size = q_BTHK.shape
    q, k, v = q_BTHK.to(wide) * scale, k_BTHK.to(wide), v_BTHV.to(wide)
    decay = v.new_zeros(rows, tokens, heads) if decay_BTH is None else decay_BTH.to(wide).clamp(min=FLOOR)
    number_BT = begins_BT = None
    if segments_BT is not None:
        real_BT11 = (segments_BT >= 0)[..., None, None]
        decay, k = torch.where(real_BT11[..., 0], decay, 0), torch.where(real_BT11, k, 0)
        number_BT = segments.filled(segments_BT)
        begins_BT = segments.begins(number_BT)
    state = v.new_zeros(rows, heads, size, v.shape[3]) if state_BHKV is None else state_BHKV.to(wide)
    walked = tokens if tokens <= STEPS else keep
    outputs, moments = [], []
    if tokens > walked:
        n = tokens - walked
        number = None if number_BT is None else number_BT[:, :n]
        y, state = _chunks(q[:, :n], k[:, :n], v[:, :n], decay[:, :n], state, number)
        outputs.append(y)
    for t in range(tokens - walked, tokens + 1):
        if t >= tokens - keep:
            moments.append(state)
        if t < tokens:
            if begins_BT is not None:
                state = torch.where(begins_BT[:, t, None, None, None], 0, state)
            state = state * decay[:, t, :, None, None].exp() + k[:, t, :, :, None] * v[:, t, :, None]
            outputs.append((q[:, t, :, None] @ state).transpose(1, 2))
    y = torch.cat(outputs, 1) if outputs else v
    if segments_BT is not None:
        y = torch.where(real_BT11, y, 0)
    return y.to(v_BTHV.dtype), torch.stack(moments, 1) if keep else moments[0]


def _chunks(q, k, v, decay, state, number_BT) -> tuple[Tensor, Tensor]:
    """At least one token, by chunks; all in one dtype, padding with decay and k 0, q scaled."""
    tokens = q.shape[1]
    # Longer chunks than keys are wide cost more inside than they save between, and add up more rounding.
    size = min(CHUNK, tokens, max(16, 1 << (q.shape[-1] - 1).bit_length()))
    q, k, v, decay = (split(x, size) for x in (q, k, v, decay))  # (B, H, n, C, ...)
    g = decay.double().cumsum(-1)  # differences of long sums: the double keeps small ones exact
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    since, until = g.exp().to(q.dtype), (g[..., -1:] - g).exp().to(q.dtype)  # from the chunk's start, to its end
    if number_BT is not None:
        same, past, future = documents(number_BT, size)
        lower, since, until = lower & same, since * past, until * future
    between = (g[..., :, None] - g[..., None, :]).masked_fill(~lower, -torch.inf).exp().to(q.dtype)
    across = since[..., -1]  # of the whole chunk
    writes = (k * until[..., None]).transpose(-1, -2) @ v
    starts = []
    for n in range(q.shape[2]):
        starts.append(state)
        state = across[:, :, n, None, None] * state + writes[:, :, n]
    y = (q * since[..., None]) @ torch.stack(starts, 2) + ((q @ k.transpose(-1, -2)) * between) @ v
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens], state
