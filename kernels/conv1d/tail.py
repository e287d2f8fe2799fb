"""Where the carried tail is: the last W-1 inputs of each row's document, by places in (the tail carried in, then x)."""

import torch
from torch import Tensor


def places(
    segments_BT: Tensor | None, rows: int, tokens: int, keep: int, reach: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Place of each input of each moment's tail, and whether it is of the tail's document; (B, keep+1, W-1) each."""
    ends_K = torch.arange(tokens - keep, tokens + 1, device=device)
    tail_W = torch.arange(reach, device=device)
    if segments_BT is None:
        place = (ends_K[:, None] + tail_W).expand(rows, -1, -1)
        return place, torch.ones_like(place, dtype=torch.bool)
    real_BT = segments_BT >= 0
    counts_BT = torch.cat([ends_K.new_zeros(rows, 1), real_BT.cumsum(1)], 1)
    place = counts_BT[:, tokens - keep :, None] + tail_W  # counted in real tokens
    column_BT = torch.cat([tail_W.expand(rows, -1), order(segments_BT) + reach], 1)
    number_BT = torch.cat([torch.zeros_like(tail_W).expand(rows, -1), segments_BT], 1)
    place = column_BT.gather(1, place.flatten(1)).view_as(place)
    number = number_BT.gather(1, place.flatten(1)).view_as(place)
    return place, number == number[..., -1:]


def order(segments_BT: Tensor) -> Tensor:
    """The columns of the real tokens of each row, in order, and after them those of padding."""
    return (segments_BT < 0).to(torch.uint8).sort(dim=1, stable=True).indices


def take(x_BTD: Tensor, state_BWD: Tensor | None, place: Tensor, valid: Tensor) -> Tensor:
    """The tails (B, keep+1, W-1, D) at those places; 0 where not valid."""
    (rows, moments, reach), size = place.shape, x_BTD.shape[2]
    shape = (rows, moments * reach, size)
    at = place.flatten(1)[..., None]
    tails = x_BTD.new_zeros(shape) if x_BTD.shape[1] == 0 else x_BTD.gather(1, (at - reach).clamp(0).expand(shape))
    if reach:
        tails = torch.where(at < reach, 0, tails)
        if state_BWD is not None:
            old = state_BWD.to(x_BTD.dtype).gather(1, at.clamp(max=reach - 1).expand(shape))
            tails = torch.where(at < reach, old, tails)
    return torch.where(valid.flatten(1)[..., None], tails, 0).view(rows, moments, reach, size)


def give(dmoments: Tensor, place: Tensor, valid: Tensor, dx_BTD: Tensor, dstate_BWD: Tensor) -> None:
    """Add the gradient of the tails to those of x and of the tail carried in."""
    rows, _, reach = place.shape
    if not reach:
        return
    at = place.flatten(1)[..., None]
    moments = dmoments.reshape(*at.shape[:2], dx_BTD.shape[2])
    g = torch.where(valid.flatten(1)[..., None], moments, 0)
    if dx_BTD.shape[1]:
        late = (g * (at >= reach)).to(dx_BTD.dtype)
        dx_BTD.scatter_add_(1, (at - reach).clamp(0).expand(g.shape), late)
    early = (g * (at < reach)).to(dstate_BWD.dtype)
    dstate_BWD.scatter_add_(1, at.clamp(max=reach - 1).expand(g.shape), early)
