"""The largest of many numbers per row, found by way of blocks: torch's own argmax and topk take many times one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu

BLOCK = 64
_LONG = 256  # where only one block is looked into: the fewer there are, the faster the pass


def _blocks(x_NC: Tensor, size: int) -> Tensor:
    """(N, blocks, size); beyond the end there is nothing large."""
    rest = -x_NC.shape[1] % size
    return (F.pad(x_NC, (0, rest), value=float("-inf")) if rest else x_NC).unflatten(1, (-1, size))


def argmax(x_NC: Tensor) -> Tensor:
    """(N,): the place of each row's largest number, the first of equals."""
    if cpu.serves(x_NC):
        return torch.ops.edifice_cpu.argmax(x_NC)
    x_NKS = _blocks(x_NC, _LONG)
    block_N11 = x_NKS.amax(-1).argmax(-1)[:, None, None]
    inside_NS = x_NKS.gather(1, block_N11.expand(-1, 1, _LONG))[:, 0]
    return block_N11[:, 0, 0] * _LONG + inside_NS.argmax(-1)


def largest(x_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers (N, k) of each row, in falling order, and their places. They lie in k blocks at most."""
    if 2 * k * BLOCK > x_NC.shape[1]:
        return x_NC.topk(k, -1)
    x_NKS = _blocks(x_NC, BLOCK)
    block_NK1 = x_NKS.amax(-1).topk(k, -1).indices[..., None]
    among_NM = x_NKS.gather(1, block_NK1.expand(-1, -1, BLOCK)).flatten(1)
    values_NK, place_NK = among_NM.topk(k, -1)
    return values_NK, block_NK1[..., 0].gather(1, place_NK // BLOCK) * BLOCK + place_NK % BLOCK
