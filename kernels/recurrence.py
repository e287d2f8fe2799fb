"""Ops with a matrix memory S (B, H, K, V) that each token changes and then reads: what all of them share.

Their definitions differ in one line, the change; `walk` is the rest: time, documents, padding, and the kept moments.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import check, segments


def checked(
    op: str,
    like_q: dict[str, Tensor],
    v_BTHV: Tensor,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
    by_head: dict[str, Tensor] | None = None,
    decay: Tensor | None = None,
) -> None:
    """Raise unless the arguments fit. like_q: of the shape of the first of them; by_head: (B, T, H); decay: either."""
    first, q_BTHK = next(iter(like_q.items()))
    check.shape(op, first, q_BTHK, (None, None, None, None), "(B, T, H, K)")
    rows, tokens, heads, size = q_BTHK.shape
    start = f"(B={rows}, T={tokens}, H={heads}"
    for name, x in like_q.items():
        check.shape(op, name, x, tuple(q_BTHK.shape), f"{tuple(q_BTHK.shape)}, the shape of {first}")
    for name, x in (by_head or {}).items():
        check.shape(op, name, x, (rows, tokens, heads), f"{start})")
    check.shape(op, "v_BTHV", v_BTHV, (rows, tokens, heads, None), f"{start}, V)")
    inputs = {**like_q, **(by_head or {}), "v_BTHV": v_BTHV}
    if decay is not None:
        want = (rows, tokens, heads) if isinstance(decay, Tensor) and decay.dim() == 3 else tuple(q_BTHK.shape)
        check.shape(op, "decay", decay, want, f"{start}) or {start}, K={size})")
        inputs["decay"] = decay
    for name, x in inputs.items():
        check.floating(op, name, x)
    if state_BHKV is not None:
        want = (rows, heads, size, v_BTHV.shape[3])
        check.shape(op, "state_BHKV", state_BHKV, want, f"(B, H, K, V) = {want}")
        check.floating(op, "state_BHKV", state_BHKV)
        inputs["state_BHKV"] = state_BHKV
    check.segments(op, segments_BT, rows, tokens)
    if segments_BT is not None:
        inputs["segments_BT"] = segments_BT
    for name, x in inputs.items():
        check.device(op, name, x, q_BTHK)
    check.keep(op, keep, tokens)


def empty(q_BTHK: Tensor, v_BTHV: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """y and the state after, unwritten."""
    rows, _, heads, size = q_BTHK.shape
    moments = (keep + 1,) if keep else ()
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    state = v_BTHV.new_empty(rows, *moments, heads, size, v_BTHV.shape[3], dtype=wide)
    return torch.empty_like(v_BTHV, memory_format=torch.contiguous_format), state


def gate(decay: Tensor, t: int) -> Tensor:
    """exp(decay) of token t, to multiply a memory (B, H, K, V) by."""
    return decay[:, t, :, None, None].exp() if decay.dim() == 3 else decay[:, t, :, :, None].exp()


def walk(
    change: Callable[[int, Tensor], Tensor],
    q_BTHK: Tensor,
    v_BTHV: Tensor,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """The definition: S = change(t, S); y = scale S^T q, with S zeroed where a document begins, and padding skipped.

    y (B, T, H, V) in v's dtype; state (B, H, K, V), or with keep (B, keep+1, H, K, V), fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    rows, tokens, heads, size = q_BTHK.shape
    q = q_BTHK.to(wide)
    if state_BHKV is None:
        state = torch.zeros(rows, heads, size, v_BTHV.shape[3], dtype=wide, device=q.device)
    else:
        state = state_BHKV.to(wide)
    begins_BT = None if segments_BT is None else segments.begins(segments.filled(segments_BT))
    outputs, moments = [], []
    for t in range(tokens + 1):
        if t >= tokens - keep:
            moments.append(state)
        if t == tokens:
            break
        before = state if begins_BT is None else torch.where(begins_BT[:, t, None, None, None], 0, state)
        after = change(t, before)
        y_BHV = scale * torch.einsum("bhkv,bhk->bhv", after, q[:, t])
        if segments_BT is not None:
            real_B111 = segments_BT[:, t, None, None, None] >= 0
            after = torch.where(real_B111, after, state)
            y_BHV = torch.where(real_B111[..., 0], y_BHV, 0)
        outputs.append(y_BHV.to(v_BTHV.dtype))
        state = after
    y_BTHV = torch.stack(outputs, 1) if outputs else v_BTHV.clone()
    return y_BTHV, torch.stack(moments, 1) if keep else moments[0].clone()
