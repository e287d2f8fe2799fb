"""Attention inside chunks: a token sees those before it in its own run of `chunk` tokens of the document.

A window as long as a chunk reaches into the chunk before and no further, so what is left to hide are the tokens of the
other parity. Two more channels do that: they add 0 to the scores of one parity and minus a great deal to the other.
Memory, paged or not, and rollback are those of a window.
"""

import torch
from torch import Tensor

from models.span import Span

FAR = 2.0**15  # exact in fp16 and bf16; e^-FAR is 0 for any scale of a score in use


def by_parity(q_BTHK: Tensor, k_BTGK: Tensor, at: Span, chunk: int) -> tuple[Tensor, Tensor]:
    """Queries and keys with the two channels, to be used with `window=chunk`."""
    odd_BT = (at.positions_BT // chunk) % 2
    sides_BT2 = torch.stack([odd_BT, 1 - odd_BT], -1)

    def widened(x_BTHK: Tensor, extra_BT2: Tensor) -> Tensor:
        extra_BTH2 = extra_BT2[:, :, None].to(x_BTHK.dtype).expand(-1, -1, x_BTHK.shape[2], -1)
        return torch.cat([x_BTHK, extra_BTH2], -1)

    return widened(q_BTHK, sides_BT2), widened(k_BTGK, (sides_BT2 - 1) * FAR)
