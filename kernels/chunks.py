"""Cutting sequences into chunks: what the chunked forms of linear recurrences share."""

import torch
from torch import Tensor

FLOOR = -200.0  # exp(FLOOR) is 0 next to 1 in any dtype; keeps a decay of -inf from making inf - inf
STEPS = 4  # calls of so few tokens walk them


def split(x: Tensor, size: int, edge: bool = False) -> Tensor:
    """(B, T, H, ...) -> (B, H, n, C, ...), or (B, T) -> (B, n, C); filled up with zeros, or the last column."""
    short = -x.shape[1] % size
    if short:
        fill = x[:, -1:].expand(-1, short) if edge else x.new_zeros(x.shape[0], short, *x.shape[2:])
        x = torch.cat([x, fill], 1)
    x = x.unflatten(1, (-1, size))
    return x if x.dim() == 3 else x.movedim(3, 1).contiguous()


def join(x: Tensor, tokens: int) -> Tensor:
    """The inverse of `split`: (B, H, n, C, ...) -> (B, T, H, ...)."""
    return x.movedim(1, 3).flatten(1, 2)[:, :tokens]


def documents(number_BT: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks over the chunks of `filled` segment numbers, all with a head dimension of 1.

    same (B, 1, n, C, C): both tokens are of one document; past (B, 1, n, C): of the document that enters the chunk;
    future (B, 1, n, C): of the one that leaves it.
    """
    number = split(number_BT, size, edge=True)[:, None]
    ends = number[..., -1:]
    enters = torch.cat([torch.zeros_like(ends[:, :, :1]), ends[:, :, :-1]], 2)
    return number[..., :, None] == number[..., None, :], number == enters, number == ends
