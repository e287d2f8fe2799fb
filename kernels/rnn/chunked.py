"""Recurrent networks for CPUs. Each step needs the last one's output, so a loop over time stays; it is kept lean.

Forward keeps the state around every token. Backward makes the recurrent products again, all tokens in one matrix
product, and with them the Jacobian of every step at once: a cell works unit by unit, so one call to autograd per state
tensor gives it whole. What is left for the loop is a few multiplications and one matrix product per token. Cells whose
gates do not read the hidden units are scans.
"""

import torch
from torch import Tensor

from kernels import op, segments
from kernels.diagonal_scan.chunked import chunked as diagonal_scan
from kernels.rnn.cells import CELLS, LINEAR


def chunked(
    x_BTGU: Tensor,
    weight: Tensor | None,
    bias_GU: Tensor | None,
    state_BSU: Tensor | None,
    segments_BT: Tensor | None,
    cell: str,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`; then, for `grad`, the states around every token (T+1, S, B, U), empty where it needs none."""
    if cell in LINEAR:
        return _scan(x_BTGU, state_BSU, segments_BT, cell, keep)
    wide = torch.promote_types(x_BTGU.dtype, torch.float32)
    x_TBGU = x_BTGU.to(wide).transpose(0, 1)
    tokens, rows, _, units = x_TBGU.shape
    fresh, step, merge = CELLS[cell].state, CELLS[cell].step, CELLS[cell].merge
    states = torch.empty(tokens + 1, len(fresh), rows, units, dtype=wide, device=x_BTGU.device)
    for s, value in enumerate(fresh):
        states[0, s] = value if state_BSU is None else state_BSU[:, s]
    recur = _recurrence(weight.to(wide), None if bias_GU is None else bias_GU.to(wide))
    real, begins = _marks(segments_BT)
    for t in range(tokens):
        before = states[t].unbind(0)
        if begins is not None:
            before = [torch.where(begins[t], value, s) for value, s in zip(fresh, before, strict=True)]
        after = step(merge(x_TBGU[t], recur(before[0])).unbind(-2), before)
        for s, value in enumerate(after):
            states[t + 1, s] = value if real is None else torch.where(real[t], value, states[t, s])
    y = states[1:, 0] if real is None else torch.where(real, states[1:, 0], 0)
    after = (states[tokens - keep :].permute(2, 0, 1, 3) if keep else states[tokens].transpose(0, 1)).clone()
    return y.transpose(0, 1).to(x_BTGU.dtype), after, states


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """Back through time. Padding passes gradients by, a document's start stops them."""
    x_BTGU, weight, bias_GU, state_BSU, segments_BT, cell, keep = args
    if cell in LINEAR:
        return op.recompute(chunked, args, grads, needs, again=False)
    states = outputs[0]
    wide, tokens = states.dtype, len(states) - 1
    real, begins = _marks(segments_BT)
    fresh = CELLS[cell].state
    before = list(states[:-1].unbind(1))  # (T, B, U) each
    if begins is not None:
        before = [torch.where(begins, value, s) for value, s in zip(fresh, before, strict=True)]
    recur = _recurrence(weight.to(wide), None if bias_GU is None else bias_GU.to(wide))
    z = CELLS[cell].merge(x_BTGU.to(wide).transpose(0, 1), recur(before[0]))
    of_z, of_state = _jacobian(cell, z, before, real)
    dy = grads[0].to(wide).transpose(0, 1)
    dy = dy if real is None else dy * real
    # By moment: of the states before the last `keep` tokens and after each, or of the final one.
    dmoments = grads[1].to(wide).permute(1, 2, 0, 3) if keep else grads[1].to(wide).transpose(0, 1)[None]
    back, gates = _adjoint(weight.to(wide)), CELLS[cell].gates
    dz = torch.empty_like(z)
    d = dmoments[keep].unbind(0)
    for t in range(tokens - 1, -1, -1):
        after = [d[0] + dy[t], *d[1:]]
        torch.mul(of_z[0][t], after[0][:, None], out=dz[t])
        for slope, g in zip(of_z[1:], after[1:], strict=True):
            dz[t].addcmul_(slope[t], g[:, None])
        found = [back(dz[t, :, :gates]), *([None] * (len(fresh) - 1))]
        for slopes, g in zip(of_state, after, strict=True):
            for p, slope in enumerate(slopes):
                if slope is not None:
                    found[p] = slope[t] * g if found[p] is None else torch.addcmul(found[p], slope[t], g)
        if real is not None:
            found = [
                torch.where(begins[t], 0, g) + torch.where(real[t], 0, a) for g, a in zip(found, after, strict=True)
            ]
        if tokens - keep <= t:
            found = [g + m for g, m in zip(found, dmoments[t - tokens + keep], strict=True)]
        d = found
    results, dr = [], dz[:, :, :gates]
    if needs[0]:
        dx = dz if gates == z.shape[2] else dz[:, :, CELLS[cell].inputs]
        results.append(dx.transpose(0, 1).to(x_BTGU.dtype))
    if needs[1]:
        results.append(_weight_grad(weight, dr, before[0]))
    if needs[2]:
        results.append(dr.sum((0, 1)).to(bias_GU.dtype))
    if needs[3]:
        results.append(torch.stack(list(d), 1).to(state_BSU.dtype))
    return results


def _scan(x_BTGU: Tensor, state_BSU: Tensor | None, segments_BT: Tensor | None, cell: str, keep: int):
    """A cell that is linear in its state, without a loop over time."""
    wide = torch.promote_types(x_BTGU.dtype, torch.float32)
    x = x_BTGU.to(wide)
    if segments_BT is not None:  # so that autograd meets no NaN at padding
        x = x.masked_fill((segments_BT < 0)[..., None, None], 0)
    decay_BTU, given_BTU = LINEAR[cell](x.unbind(2))
    carried = None if state_BSU is None else state_BSU[:, 0]
    y_BTU, after = diagonal_scan(given_BTU, decay_BTU, carried, segments_BT, keep)
    return y_BTU.to(x_BTGU.dtype), after[..., None, :], x_BTGU.new_empty(0, dtype=wide)


def _jacobian(cell: str, z: Tensor, before: list[Tensor], real: Tensor | None):
    """Of each state after: by z, (T, B, Z, U); by each state before, (T, B, U), None where it is 0. 0 at padding."""
    with op.recording():
        z, *before = (v.detach().requires_grad_() for v in (z, *before))
        after = CELLS[cell].step(z.unbind(-2), before)
        ones = torch.ones_like(after[0])
        of_z, of_state = [], []
        for s in after:
            slope, *slopes = torch.autograd.grad(s, [z, *before], ones, retain_graph=True, allow_unused=True)
            of_z.append(slope if real is None else torch.where(real[:, :, None], slope, 0))
            of_state.append([g if g is None or real is None else torch.where(real, g, 0) for g in slopes])
    return of_z, of_state


def _recurrence(weight: Tensor, bias_GU: Tensor | None):
    """From hidden units (..., B, U) to gates (..., B, G, U)."""
    if weight.dim() == 2:

        def recur(h):
            return weight * h[..., None, :]

    elif len(weight) == 1:
        gates, units = weight.shape[1:3]
        flat = weight[0].flatten(0, 1).T  # (U, G U)

        def recur(h):
            return (h @ flat).unflatten(-1, (gates, units))

    else:

        def recur(h):
            return torch.einsum("ngij,...nj->...gni", weight, h.unflatten(-1, (len(weight), -1))).flatten(-2)

    return recur if bias_GU is None else lambda h: recur(h) + bias_GU


def _adjoint(weight: Tensor):
    """From gradients of gates (B, G, U) to those of hidden units (B, U)."""
    if weight.dim() == 2:
        return lambda dr: (dr * weight).sum(1)
    if len(weight) == 1:
        flat = weight[0].flatten(0, 1)
        return lambda dr: dr.flatten(1) @ flat
    return lambda dr: torch.einsum("ngij,bgni->bnj", weight, dr.unflatten(-1, (len(weight), -1))).flatten(-2)


def _weight_grad(weight: Tensor, dr: Tensor, before: Tensor) -> Tensor:
    """The gradient of the weight, one product over all tokens: dr (T, B, G, U), the hidden units read (T, B, U)."""
    if weight.dim() == 2:
        return (dr * before[:, :, None]).sum((0, 1)).to(weight.dtype)
    heads, gates, size, _ = weight.shape
    # One head is a view; transposed by the product and not by a copy.
    dr = dr.unflatten(-1, (heads, size)).permute(3, 0, 1, 2, 4).reshape(heads, -1, gates * size)
    before = before.unflatten(-1, (heads, size)).permute(2, 0, 1, 3).reshape(heads, -1, size)
    return (dr.transpose(1, 2) @ before).view_as(weight).to(weight.dtype)


def _marks(segments_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where tokens are real, and where documents begin: (T, B, 1) bool each."""
    if segments_BT is None:
        return None, None
    begins_BT = segments.begins(segments.filled(segments_BT))
    return (segments_BT >= 0).T[..., None], begins_BT.T[..., None]
