"""Which tokens of a sequence a rank holds.

contiguous: rank r of n has the r-th of n equal pieces.
zigzag:     the r-th and the r-th from the end of 2n pieces, so that under a causal mask all ranks have the same work.
"""

import torch
from torch import Tensor

BALANCES = ("zigzag", "contiguous")


def pieces(rank: int, ranks: int, balance: str) -> tuple[int, ...]:
    """Numbers of the pieces of the sequence that `rank` holds, in order."""
    if balance not in BALANCES:
        raise ValueError(f"balance={balance!r} must be {' or '.join(map(repr, BALANCES))}")
    return (rank, 2 * ranks - 1 - rank) if balance == "zigzag" else (rank,)


def positions(
    rank: int, ranks: int, tokens: int, balance: str = "zigzag", device: torch.device | None = None
) -> Tensor:
    """Where in the whole sequence the `tokens` tokens of a rank stand, (T,) int64."""
    held = pieces(rank, ranks, balance)
    if tokens % len(held):
        raise ValueError(f"zigzag: a rank holds two pieces of one length, so T={tokens} must be even")
    size = tokens // len(held)
    return torch.cat([torch.arange(piece * size, (piece + 1) * size, device=device) for piece in held])


def shard(x: Tensor, rank: int, ranks: int, balance: str = "zigzag", dim: int = 1) -> Tensor:
    """The part of a whole sequence that `rank` holds. ValueError where its length does not divide."""
    held = pieces(rank, ranks, balance)
    count = len(held) * ranks
    if x.shape[dim] % count:
        raise ValueError(f"{balance}: {x.shape[dim]} tokens must be a multiple of {count} for {ranks} ranks")
    every = x.unflatten(dim, (count, -1))
    return torch.cat([every.select(dim, piece) for piece in held], dim)


def unshard(parts: list[Tensor], balance: str = "zigzag", dim: int = 1) -> Tensor:
    """The whole sequence, from what each rank holds, in the order of ranks."""
    held = [piece for rank in range(len(parts)) for piece in pieces(rank, len(parts), balance)]
    each = len(held) // len(parts)
    cut = [piece for part in parts for piece in part.unflatten(dim, (each, -1)).unbind(dim)]
    return torch.cat([piece for _, piece in sorted(zip(held, cut, strict=True), key=lambda pair: pair[0])], dim)
