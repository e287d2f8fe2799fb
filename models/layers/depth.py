"""Layers that not every token passes: how a block runs over some of the tokens of each row.

With whole rows at hand (training) the tokens that pass are brought together, and the block sees a shorter sequence.
Token by token the block sees the others as padding, which writes nothing, so that its cache holds those that passed and
no more; how many of a row's document did is state of its own. Either way a token has its original place for position
schemes. What lower layers hand up is read; what a block would hand up for some tokens is not there for all, and stays.

A block is anything that is called and remembers like one.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.choice import Choice
from models.span import Span, localize
from models.state import Kept, State, TensorSpec


def passes(choice: Choice, scores_BT: Tensor) -> Tensor:
    """Whether each token passes, by its own score alone: that it is above zero. (B, T) bool."""
    return choice(torch.stack([torch.zeros_like(scores_BT), scores_BT.detach()], -1), 1)[..., 0] == 1


def spec(block, max_len: int) -> dict[str, TensorSpec]:
    """State of a block that some tokens pass: its own, and how many tokens of the document have passed.

    Entries are written one after the other by whichever tokens pass, so any later token may write next to early ones.
    """
    spec = {name: replace(part, late=-1) if part.every else part for name, part in block.state_spec(max_len).items()}
    return {"length": TensorSpec((), torch.int64)} | spec


def largest(choice: Choice, scores_BT: Tensor, count: int, open_BT: Tensor | None) -> Tensor:
    """Columns (B, count) int64 of the largest scores, ascending; of those not open only where too few are."""
    scores_BT = scores_BT.detach()
    if open_BT is not None:
        scores_BT = scores_BT.masked_fill(~open_BT, torch.finfo(scores_BT.dtype).min)
    return choice(scores_BT, count).sort(1).values


def together(block, x_BTD: Tensor, at: Span, index_Bk: Tensor) -> Tensor:
    """The block's output (B, k, D) for the tokens at `index_Bk`, ascending, as a sequence of their own."""
    if at.segments_BT is None:
        segments_Bk = None
        positions_Bk = torch.arange(index_Bk.shape[1], device=index_Bk.device).expand_as(index_Bk)
    else:
        segments_Bk, positions_Bk = localize(at.segments_BT.gather(1, index_Bk))
    some = replace(
        at,
        positions_BT=positions_Bk,
        segments_BT=segments_Bk,
        ids_BT=None if at.ids_BT is None else columns(at.ids_BT, index_Bk),
        places_BTA=columns(at.places, index_Bk),
        shared={name: columns(value, index_Bk) for name, value in at.shared.items()},
    )
    return block(columns(x_BTD, index_Bk), some)[0]


def one_by_one(block, x_BTD: Tensor, at: Span, state: State | None, passing_BT: Tensor) -> tuple[Tensor, State | None]:
    """The block's output (B, T, D), unspecified where `passing_BT` (bool) is False, and the state after."""
    segments_BT = torch.zeros_like(at.positions_BT) if at.segments_BT is None else at.segments_BT
    passed_BT = torch.where(passing_BT, segments_BT, -1)
    length_B = at.positions_BT.new_zeros(len(x_BTD)) if state is None else state["length"]
    # The carried document goes on if any of its tokens has passed; if not it begins with the first one that does.
    local_BT, positions_BT = localize(passed_BT, length_B, torch.zeros_like(length_B))
    some = replace(
        at,
        positions_BT=positions_BT,
        segments_BT=local_BT,
        length_B=None if state is None else length_B,
        places_BTA=at.places,
        shared=dict(at.shared),
    )
    if state is None:
        return block(x_BTD, some)
    y_BTD, after = block(x_BTD, some, {name: value for name, value in state.items() if name != "length"})
    return y_BTD, {"length": _lengths(at, passed_BT >= 0, length_B)} | after


def teach(logits_BT: Tensor, index_Bk: Tensor, at: Span, weight: float, open_BT: Tensor | None) -> None:
    """Add the loss that lets a router foretell from one token what was chosen from the row, of those open."""
    chosen_BT = torch.zeros_like(logits_BT).scatter(1, index_Bk, 1.0)
    open_BT = torch.ones_like(chosen_BT) if open_BT is None else open_BT.to(chosen_BT.dtype)
    count = open_BT.sum().clamp(min=1)
    losses_BT = F.binary_cross_entropy_with_logits(logits_BT, chosen_BT, reduction="none")
    at.losses.append(weight * (losses_BT * open_BT).sum() / count)
    at.log(foretold=(((logits_BT > 0) == (chosen_BT > 0)) * open_BT).sum() / count)


def columns(x: Tensor, index_Bk: Tensor) -> Tensor:
    """Columns of x (B, T, ...); also of (1, T, ...), which is the same for all rows."""
    return x.expand(len(index_Bk), *x.shape[1:]).gather(1, _beside(index_Bk, x))


def put(x_BTD: Tensor, index_Bk: Tensor, new_BkD: Tensor) -> Tensor:
    """x with other values in some columns; the rest is bit-equal."""
    return x_BTD.scatter(1, _beside(index_Bk, x_BTD), new_BkD.to(x_BTD.dtype))


def _beside(index_Bk: Tensor, x: Tensor) -> Tensor:
    return index_Bk.view(*index_Bk.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])


def _lengths(at: Span, passed_BT: Tensor, length_B: Tensor) -> Tensor | Kept:
    """Tokens of the current document that have passed: after the call (B,), or at each moment that is kept."""
    count_BT = passed_BT.long().cumsum(1)
    length_BT = length_B[:, None] + count_BT
    if at.segments_BT is not None:  # a document that begins has passed nothing, whatever the one before it has
        begun_BT = at.segments_BT.clamp(min=0).cummax(1).values
        starts_BT = begun_BT > torch.cat([torch.zeros_like(begun_BT[:, :1]), begun_BT[:, :-1]], 1)
        before_BT = torch.where(starts_BT, count_BT - passed_BT.long(), -1).cummax(1).values
        length_BT = torch.where(before_BT >= 0, count_BT - before_BT, length_BT)
    if not at.keep:
        return length_BT[:, -1]
    return Kept(torch.cat([length_B[:, None], length_BT], 1)[:, -at.keep - 1 :])
