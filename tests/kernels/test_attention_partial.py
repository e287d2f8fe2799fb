"""attend and attend_grad: blocks of keys at any positions add up to all of them, and to autograd's gradients."""

import pytest
import torch

from kernels.attention.partial import attend, attend_grad
from tests.kernels.physics import DEVICE, close, using

FAR = 2.0**-7  # of bf16 results


def dense(q, k, v, q_at, k_at, q_in, k_in, scale, window, causal):
    """y and lse by one matrix of logits."""
    ratio = q.shape[2] // k.shape[2]
    logits = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(ratio, 2)) * scale
    near = q_at[:, :, None] - k_at[:, None]
    sees = torch.ones_like(near, dtype=torch.bool)
    if causal:
        sees &= near >= 0
    if window:
        sees &= near < window
    if q_in is not None:
        sees &= (q_in[:, :, None] == k_in[:, None]) & (q_in[:, :, None] >= 0)
    logits = logits.masked_fill(~sees[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.clamp(min=-1e300)[..., None])
    y = torch.einsum("bhts,bshv->bthv", weights, v.repeat_interleave(ratio, 2))
    return y, lse.transpose(1, 2)


def drawn(tokens, keys, rows=2, heads=2, groups=1, size=24, size_v=20):
    draw = [torch.randn(rows, n, h, d, device=DEVICE) for n, h, d in
            ((tokens, heads, size), (keys, groups, size), (keys, groups, size_v), (tokens, heads, size_v))]  # fmt: skip
    return draw


def zigzag(rank, ranks, piece):
    """Positions of the two pieces of a rank."""
    one = torch.arange(piece, device=DEVICE)
    return torch.cat([rank * piece + one, (2 * ranks - 1 - rank) * piece + one])[None].expand(2, -1)


def documents(at):
    """Documents that end at 50, 130 and 170; 90 to 99 is padding."""
    inside = (at >= 50).long() + (at >= 130) + (at >= 170)
    return inside.masked_fill((at >= 90) & (at < 100), -1)


@pytest.mark.parametrize(
    "causal, window, packed", [(True, 0, False), (True, 60, True), (False, 0, True), (False, 9, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_add_up(causal, window, packed, dtype, form):
    """The ring of 3 ranks: rank 1's queries, the keys of all ranks one after the other."""
    ranks, piece, scale = 3, 37, 0.3
    q, k, v, dy = (x.to(dtype) for x in drawn(2 * piece, 6 * piece))
    k_at = torch.cat([zigzag(r, ranks, piece) for r in range(ranks)], 1)
    q_at = zigzag(1, ranks, piece)
    q_in, k_in = (documents(at) if packed else None for at in (q_at, k_at))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = dense(*exact, q_at, k_at, q_in, k_in, scale, window, causal)
    wanted = torch.autograd.grad(want, exact, dy.double())
    blocks = [slice(2 * piece * r, 2 * piece * (r + 1)) for r in range(ranks)]
    places = [(q_at, k_at[:, s], q_in, None if k_in is None else k_in[:, s]) for s in blocks]
    with using(form):
        parts = [attend(q, k[:, s], v[:, s], *at, scale, window, causal) for s, at in zip(blocks, places, strict=True)]
        lse = torch.stack([part for _, part in parts]).logsumexp(0)
        share = [torch.exp(part - lse.clamp(min=-1e30)).float()[..., None] for _, part in parts]
        y = sum(s * part for s, (part, _) in zip(share, parts, strict=True))
        delta = (dy.float() * y).sum(-1)
        found = [
            attend_grad(q, k[:, s], v[:, s], *at, scale, window, causal, lse, delta, dy)
            for s, at in zip(blocks, places, strict=True)
        ]
    ours = (sum(dq for dq, _, _ in found), *(torch.cat([f[i] for f in found], 1) for i in (1, 2)))
    assert lse.dtype == torch.float64 and y.dtype == ours[0].dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else FAR
    close(y, want.detach().float(), tolerance)
    close(lse, want_lse.detach(), 1e-5)
    for mine, theirs in zip(ours, wanted, strict=True):
        close(mine, theirs.float(), tolerance)


def test_a_block_out_of_sight_adds_nothing(form):
    q, k, v, dy = drawn(20, 30)
    q_at, k_at = torch.arange(20, device=DEVICE)[None], 100 + torch.arange(30, device=DEVICE)[None]
    with using(form):
        y, lse = attend(q, k, v, q_at, k_at, None, None, 0.3)
        found = attend_grad(q, k, v, q_at, k_at, None, None, 0.3, 0, True, lse, torch.zeros_like(lse), dy)
    assert not y.any() and (lse == -torch.inf).all()
    assert not any(x.any() for x in found)
