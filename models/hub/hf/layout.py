"""Which tensors of ours hold the numbers of which tensors of theirs: one list of rows, read in both directions.

A row joins tensors of theirs to one of ours and splits it again. What shape theirs must have is never written down: it
is what splitting ours gives.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SKIPPED = r".*rotary_emb\.inv_freq"  # derived from the config; old checkpoints hold it


@dataclass(frozen=True)
class Row:
    """join: tensors in the order of `theirs`, and empty ones of our shapes, to ours. split: its inverse."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    join: Callable[[list[Tensor], list[Tensor]], list[Tensor]]
    split: Callable[[list[Tensor]], list[Tensor]]

    def within(self, ours: str, theirs: str) -> "Row":
        """The row with all names prefixed."""
        mine, their = (tuple(p + n for n in names) for p, names in ((ours, self.ours), (theirs, self.theirs)))
        return replace(self, ours=mine, theirs=their)


def same(ours: str, theirs: str) -> Row:
    """Equal tensors."""
    return mapped(ours, theirs, lambda x: x, lambda x: x)


def mapped(ours: str, theirs: str, load: Callable[[Tensor], Tensor], save: Callable[[Tensor], Tensor]) -> Row:
    """ours = load(theirs), theirs = save(ours)."""
    return Row((ours,), (theirs,), lambda parts, like: [load(parts[0])], lambda parts: [save(parts[0])])


def above_one(ours: str, theirs: str) -> Row:
    """A norm's weight that is stored as its distance from 1; in fp32, since in bf16 a small distance would be lost."""
    return mapped(ours, theirs, lambda x: x.float() + 1, lambda x: x - 1)


def shaped(ours: str, theirs: str, *shape: int) -> Row:
    """The same numbers, theirs of another shape."""
    return Row((ours,), (theirs,), lambda parts, like: [parts[0].view(like[0].shape)], lambda xs: [xs[0].view(shape)])


def constant(ours: str, value: float) -> Row:
    """A tensor that they do not have, as if all of it were `value`; ours can only be written where it is."""

    def split(parts: list[Tensor]) -> list[Tensor]:
        if not parts[0].is_meta and (parts[0] != value).any():
            raise ValueError(f"{ours} has no place in it unless all of it is {value:g}")
        return []

    return Row((ours,), (), lambda parts, like: [torch.full_like(like[0], value, device="cpu")], split)


def stacked(ours: str | dict[str, int], theirs: dict[str, int], order: Tensor | None = None) -> Row:
    """Ours one below the other are theirs one below the other, of so many rows each.

    order: row i of our stack is row order[i] of theirs.
    """
    mine = ours if isinstance(ours, dict) else {ours: sum(theirs.values())}
    back = None if order is None else order.argsort()

    def moved(parts: list[Tensor], order: Tensor | None, sizes: dict[str, int]) -> list[Tensor]:
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return list((x if order is None else x[order.to(x.device)]).split(list(sizes.values())))

    return Row(
        tuple(mine),
        tuple(theirs),
        lambda parts, like: moved(parts, order, mine),
        lambda parts: moved(parts, back, theirs),
    )


def linear(
    ours: str | dict[str, int], theirs: dict[str, int], bias: bool = False, order: Tensor | None = None
) -> list[Row]:
    """`stacked` for the weights of linear layers, and for their biases."""
    mine = ours if isinstance(ours, dict) else {ours: sum(theirs.values())}
    return [
        stacked(*({f"{name}.{kind}": size for name, size in side.items()} for side in (mine, theirs)), order)
        for kind in (("weight", "bias") if bias else ("weight",))
    ]


def unpaired(heads: int, dim: int, turned: int | None = None, first: int = 0) -> Tensor:
    """Order of the rows of a projection to heads of `dim` channels whose rotary pairs are (2i, 2i + 1), as ours turn.

    turned: channels that turn, from channel `first` of each head on.
    """
    turned = dim if turned is None else turned
    if turned % 2:
        raise ValueError(f"config.json: {turned} channels of a head turn, they must be even in number")
    inside = torch.arange(dim)
    inside[first : first + turned] = first + torch.arange(turned).view(-1, 2).T.flatten()
    return (torch.arange(heads)[:, None] * dim + inside).flatten()


def load(
    rows: Iterable[Row],
    shapes: dict[str, Tensor],
    tensors: dict[str, Tensor],
    skipped: str,
    repeated: dict[str, str],
) -> dict[str, Tensor]:
    """Our tensors by name; `shapes`: meta tensors of ours; skipped, repeated: as of `Checkpoint`.

    ValueError, one line, for a tensor of theirs that is missing, of another shape, not floating, or left over.
    """
    rest, taken = dict(tensors), {}
    for name, other in repeated.items():
        if name in rest and other in rest and not torch.equal(rest.pop(name), rest[other]):
            raise ValueError(f"{name} is not equal to {other}, as tie_word_embeddings=True says")
    for row in rows:
        parts = []
        likes = [shapes[name] for name in row.ours]
        for name, like in zip(row.theirs, row.split(likes), strict=True):
            if name not in rest:
                raise ValueError(f"{name} is missing")
            part = rest.pop(name)
            if part.shape != like.shape:
                raise ValueError(f"{name} has shape {tuple(part.shape)}, the config makes {tuple(like.shape)}")
            if not part.is_floating_point():
                raise ValueError(f"{name} is {part.dtype}: quantized checkpoints are not read")
            parts.append(part)
        taken |= dict(zip(row.ours, row.join(parts, likes), strict=True))
    for name in rest:
        if not re.fullmatch(f"{SKIPPED}|{skipped}", name):
            raise ValueError(f"{name}: this weight has no place in the model")
    return taken


def save(rows: Iterable[Row], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Theirs by name. ValueError for a tensor of ours that has no row."""
    rest, written = dict(tensors), {}
    for row in rows:
        written |= dict(zip(row.theirs, row.split([rest.pop(name) for name in row.ours]), strict=True))
    if rest:
        raise ValueError(f"{min(rest)} has no place in it")
    return written
