"""Causal depthwise convolution for CPUs: W shifted products of whole sequences.

Packing costs a mask per tap. Padding is taken out first (real tokens move to the front of their row) and put back
after, so that the taps of a token are always the columns just before it.
"""

import torch
from torch import Tensor


def chunked(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    segments_BT: Tensor | None,
    silu: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """x (B, T, D) -> y (B, T, D), state (B, W-1, D) or with keep (B, keep+1, W-1, D); as `reference`."""
    rows, tokens, dim = x_BTD.shape
    reach = weight_DW.shape[1] - 1
    real_BT = None if segments_BT is None or bool((segments_BT >= 0).all()) else segments_BT >= 0
    if real_BT is not None:
        order_BT = real_BT.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices
        back_BT = order_BT.argsort(1)
        segments_BT = segments_BT.gather(1, order_BT)
        x_BTD = x_BTD.gather(1, order_BT[..., None].expand_as(x_BTD))
    tail = x_BTD.new_zeros(rows, reach, dim) if state_BWD is None else state_BWD.to(x_BTD.dtype)
    line = torch.cat([tail, x_BTD], 1)  # what came before, then the real tokens
    number = None if segments_BT is None else torch.cat([segments_BT.new_zeros(rows, reach), segments_BT], 1)
    y_BTD = _taps(line, number, weight_DW, bias_D, silu)
    if real_BT is not None:
        y_BTD = y_BTD.gather(1, back_BT[..., None].expand_as(y_BTD)) * real_BT[..., None]
    moments = [_tail(line, number, real_BT, tokens - keep + j, reach) for j in range(keep + 1)]
    return y_BTD, torch.stack(moments, 1) if keep else moments[0]


def _taps(line: Tensor, number: Tensor | None, weight_DW: Tensor, bias_D: Tensor | None, silu: bool) -> Tensor:
    wide = torch.promote_types(line.dtype, torch.float32)
    taps = weight_DW.shape[1]
    tokens = line.shape[1] - taps + 1
    weight = weight_DW.to(wide).unbind(1)
    line_wide = line.to(wide)
    y = line_wide[:, taps - 1 :] * weight[taps - 1]
    y = y if bias_D is None else y + bias_D.to(wide)
    for w in range(taps - 1):
        x = line_wide[:, w : w + tokens]
        if number is not None:
            x = x * (number[:, w : w + tokens] == number[:, taps - 1 :])[..., None]
        y = torch.addcmul(y, x, weight[w])
    return (torch.nn.functional.silu(y) if silu else y).to(line.dtype)


def _tail(line: Tensor, number: Tensor | None, real_BT: Tensor | None, column: int, reach: int) -> Tensor:
    """The last `reach` inputs of each row's document after its first `column` columns."""
    if number is None:
        return line[:, column : column + reach]
    if real_BT is None:
        tail, of = line[:, column : column + reach], number[:, column : column + reach]
        last_B1 = number[:, column + reach - 1 :][:, :1] if reach else of
    else:
        ends_BW = real_BT[:, :column].sum(1)[:, None] + torch.arange(reach, device=line.device)
        tail = line.gather(1, ends_BW[..., None].expand(-1, -1, line.shape[2]))
        of = number.gather(1, ends_BW)
        last_B1 = of[:, -1:]
    return tail * (of == last_B1)[..., None]
