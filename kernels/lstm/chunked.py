"""The LSTM for CPUs. Each step needs the last one's output, so a loop over time is unavoidable; it is kept lean.

A step is one matrix product and a few writes into memory laid out by time. Backward is a loop of its own over the saved
gates: everything that does not depend on later steps is made for all tokens at once, and the gradient of the weight is
one product at the end.
"""

import torch
from torch import Tensor

from kernels import segments


def chunked(
    x_BT4H: Tensor,
    weight_4HH: Tensor,
    hidden_BH: Tensor | None,
    cell_BH: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference`; then, for `grad`, the gates (T, B, 4H), and hidden and cell (T+1, B, H) around every token."""
    wide = torch.promote_types(x_BT4H.dtype, torch.float32)
    rows, tokens, size = x_BT4H.shape[0], x_BT4H.shape[1], weight_4HH.shape[1]
    x, weight = x_BT4H.to(wide).transpose(0, 1), weight_4HH.to(wide).T
    gates = torch.empty(tokens, rows, 4 * size, dtype=wide, device=x.device)
    hiddens, cells = (torch.empty(tokens + 1, rows, size, dtype=wide, device=x.device) for _ in range(2))
    hiddens[0] = 0 if hidden_BH is None else hidden_BH
    cells[0] = 0 if cell_BH is None else cell_BH
    real, begins = _marks(segments_BT)
    for t in range(tokens):
        h, c = hiddens[t], cells[t]
        if begins is not None:
            h, c = torch.where(begins[t], 0, h), torch.where(begins[t], 0, c)
        z = torch.addmm(x[t], h, weight, out=gates[t])
        z[:, : 2 * size].sigmoid_()
        z[:, 2 * size : 3 * size].tanh_()
        z[:, 3 * size :].sigmoid_()
        i, f, g, o = z.chunk(4, 1)
        torch.mul(f, c, out=cells[t + 1]).addcmul_(i, g)
        torch.tanh(cells[t + 1], out=hiddens[t + 1]).mul_(o)
        if real is not None:
            cells[t + 1] = torch.where(real[t], cells[t + 1], cells[t])
            hiddens[t + 1] = torch.where(real[t], hiddens[t + 1], hiddens[t])
    y = hiddens[1:] if real is None else torch.where(real, hiddens[1:], 0)
    hidden, cell = (s[tokens - keep :].transpose(0, 1).clone() if keep else s[tokens].clone() for s in (hiddens, cells))
    return y.transpose(0, 1).to(x_BT4H.dtype), hidden, cell, gates, hiddens, cells


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """Back through time. Padding passes gradients by, a document's start stops them."""
    x_BT4H, weight_4HH, hidden_BH, cell_BH, segments_BT, keep = args
    gates, hiddens, cells = outputs
    tokens, size = gates.shape[0], weight_4HH.shape[1]
    weight = weight_4HH.to(gates.dtype)
    real, begins = _marks(segments_BT)
    before, cells_before = hiddens[:-1], cells[:-1]
    if begins is not None:
        before, cells_before = torch.where(begins, 0, before), torch.where(begins, 0, cells_before)
    # Slopes of what a step makes: of the cell by i, f, g; of the output by o and by the cell; of the cell by the last.
    i, f, g, o = gates.chunk(4, 2)
    tanh = cells[1:].tanh()
    of_ifg = torch.stack([g * i * (1 - i), cells_before * f * (1 - f), i * (1 - g * g)], 2)
    of_o, of_cell, forget = tanh * o * (1 - o), o * (1 - tanh * tanh), f
    if real is not None:
        of_ifg, of_o, of_cell = of_ifg * real[..., None], of_o * real, of_cell * real
        forget, passed = torch.where(real, f, 1), torch.where(real, 0, 1).to(gates.dtype)
        forget = torch.where(begins, 0, forget)
    dy, dhidden, dcell = (
        grad.to(gates.dtype).transpose(0, 1) if grad.dim() == 3 else grad.to(gates.dtype)[None] for grad in grads
    )  # by time; of states only the last keep + 1
    dy = dy if real is None else dy * real
    dz = torch.empty_like(gates).unflatten(2, (4, size))
    dh, dc = dhidden[keep], dcell[keep]
    for t in range(tokens - 1, -1, -1):
        dout = dh + dy[t]
        dc = torch.addcmul(dc, dout, of_cell[t])
        torch.mul(of_ifg[t], dc[:, None], out=dz[t, :, :3])
        torch.mul(of_o[t], dout, out=dz[t, :, 3])
        dc = dc * forget[t]
        if real is None:
            dh = dz[t].flatten(1) @ weight
        else:
            dh = torch.addmm(dh * passed[t], dz[t].flatten(1), weight)
            dh = torch.where(begins[t], 0, dh)
        if tokens - keep <= t:
            dh, dc = dh + dhidden[t - tokens + keep], dc + dcell[t - tokens + keep]
    dz = dz.flatten(2)
    found = []
    if needs[0]:
        found.append(dz.transpose(0, 1).to(x_BT4H.dtype))
    if needs[1]:
        found.append((dz.flatten(0, 1).T @ before.flatten(0, 1)).to(weight_4HH.dtype))
    if needs[2]:
        found.append(dh.to(hidden_BH.dtype))
    if needs[3]:
        found.append(dc.to(cell_BH.dtype))
    return found


def _marks(segments_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where tokens are real, and where documents begin: (T, B, 1) bool each."""
    if segments_BT is None:
        return None, None
    begins_BT = segments.begins(segments.filled(segments_BT))
    return (segments_BT >= 0).T[..., None], begins_BT.T[..., None]
