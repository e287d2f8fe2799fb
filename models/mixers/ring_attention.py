"""Ring attention: a sequence too long for one machine is sharded over ranks, and keys travel round the ring.

    y = sum_r exp(lse_r - lse) y_r,  lse = log sum_r exp(lse_r);  y_r, lse_r: attention to the keys of rank r alone

arXiv 2310.01889, with zigzag shards (a rank holds a piece of the front and its mirror image at the back), so that under
a causal mask all ranks have the same work. Alone, and with a state, it is `gqa` with the same weights; after `join` a
call without a state sees this rank's shard, as `kernels.ring.shard` cuts it.
"""

from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor, nn

import kernels
from kernels.ring import positions
from models.mixers.gqa import GQA
from models.scores.softmax import Softmax
from models.span import Span
from models.state import State
from models.stateful import Place

DOCUMENTS = "documents"  # of `Span.shared`: the shard of the whole sequence's document numbers


@dataclass(frozen=True)
class Seat:
    """Where a rank sits in the ring, and how the sequence is cut."""

    group: str
    rank: int
    ranks: int
    balance: str


class RingAttention(GQA):
    @dataclass(frozen=True)
    class Config(GQA.Config):
        """As of gqa."""

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.seat: Seat | None = None

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        """With a seat and without a state the T tokens are this rank's shard, T the same on every rank.

        Documents and padding are then told by at.shared["documents"] (B, T) int64: this rank's shard of numbers that do
        not fall along the whole sequence, -1 for padding. A rank cannot number them by itself.
        """
        if self.seat is None or state is not None:
            return super().forward(x_BTD, at, state)
        c, seat = self.config, self.seat
        segments_BT = at.shared.get(DOCUMENTS)
        if segments_BT is None and at.segments_BT is not None:
            raise ValueError(
                f"ring_attention: documents or padding in a shard; give all ranks' numbers in shared[{DOCUMENTS!r}]"
            )
        if at.places_BTA is None:
            places_T = positions(seat.rank, seat.ranks, x_BTD.shape[1], seat.balance, x_BTD.device)
            at = replace(at, places_BTA=places_T.expand(x_BTD.shape[:2]))
        q_BTHK, k_BTGK, v_BTGV = self.project(x_BTD, at)
        options = {"scale": c.scale or None, "window": c.window, "mask": c.mask, "balance": seat.balance}
        y_BTHV = kernels.ring_attention(q_BTHK, k_BTGK, v_BTGV, seat.group, segments_BT=segments_BT, **options)
        return self.wo(self.out_norm(y_BTHV.flatten(2))), None


def join(model: nn.Module, group: dist.ProcessGroup | None, balance: str = "zigzag") -> None:
    """Seat every ring_attention of a model in the ring of `group`; None: each rank is alone again.

    Parameters are whole on every rank; their gradients are shares, which add up to the whole sequence's. ValueError
    where the model has no such mixer, or one whose scores cannot be added up over ranks.
    """
    mixers = [part for part in model.modules() if isinstance(part, RingAttention)]
    if not mixers:
        raise ValueError("ring_attention.join: the model has no ring_attention; name it in its pattern")
    for mixer in mixers:
        scores = mixer.scores
        plain = isinstance(scores, Softmax) and not scores.config.softcap and scores.sinks_H is None
        if group is not None and not (plain and mixer.positions.slopes_H is None):
            raise ValueError("ring_attention.join: scores must be plain softmax, positions without a bias by distance")
        mixer.seat = None if group is None else Seat(group.group_name, group.rank(), group.size(), balance)
