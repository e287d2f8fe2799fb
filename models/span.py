"""Where the tokens of one call stand: their document, their index in it, and what is padding.

`localize` turns what a caller knows (document ids, the carried lengths) into what kernels need (local segment
numbers, positions), once for the whole stack. The common case, no packing and no padding, stays None so that kernels
keep their fast paths.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from models.tree import Paths, paths


@dataclass(frozen=True)
class Span:
    """B rows, T tokens.

    positions_BT: index of each token in its document, int64: where it is stored. Position 0 starts from fresh state.
    places_BTA:   where position schemes take the tokens to stand when that is not their index: (B, T), or (B, T, axes)
                  for time, height and width; None: positions_BT.
    ids_BT:       token ids, for parts that look them up again; None when the caller starts from embeddings.
    segments_BT:  0 continues the carried document, n is the n-th document begun in this call, -1 is padding, which
                  writes nothing. None: no padding, and no document begins after the first column.
    length_B:     tokens of the carried document before this call, int64; None when nothing is carried.
    keep:         fixed-size state also returns its value before the last `keep` columns and after each of them.
    shared:       what lower layers of this call hand to higher ones, name -> (B, T, ...); a layer may add to it.
    losses:       auxiliary losses, weighted, that parts add in training; the decoder adds them to its own.
    metrics:      scalars that parts log, detached, averaged over those of one name.
    parents_BT:   of a draft tree, the column of each token's parent, before it; -1 at a root, which follows the carried
                  document. Segments are then 0 or -1, and positions those along the branches. None: no tree.
    drafts:       these tokens are guesses: growing state comes back unwritten, as `models.state.Drafted`.
    """

    positions_BT: Tensor
    ids_BT: Tensor | None = None
    segments_BT: Tensor | None = None
    length_B: Tensor | None = None
    keep: int = 0
    shared: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)
    places_BTA: Tensor | None = None
    parents_BT: Tensor | None = None
    drafts: bool = False

    @cached_property
    def paths(self) -> Paths:
        """The lines of the draft tree."""
        return paths(self.parents_BT, self.valid_BT)

    @property
    def valid_BT(self) -> Tensor | None:
        """True where a token is real; None when all are."""
        return None if self.segments_BT is None else self.segments_BT >= 0

    @property
    def places(self) -> Tensor:
        """Where the tokens stand for position schemes: (B, T), or (B, T, axes)."""
        return self.positions_BT if self.places_BTA is None else self.places_BTA

    def log(self, **values: Tensor) -> None:
        """Add scalars to the metrics of this call."""
        for name, value in values.items():
            self.metrics.setdefault(name, []).append(value.detach())

    def along(self, lines: Paths) -> "Span":
        """The span in which each line of the draft tree is a row, (B L, K): what lies on it are guesses in a chain."""
        valid = lines.columns_BLK.flatten(0, 1) >= 0
        return replace(
            self,
            positions_BT=lines.spread(self.positions_BT),
            ids_BT=None if self.ids_BT is None else lines.spread(self.ids_BT),
            segments_BT=None if bool(valid.all()) else valid.long() - 1,
            length_B=self.length_B.repeat_interleave(lines.columns_BLK.shape[1]),
            keep=lines.columns_BLK.shape[2],
            shared={name: lines.spread(value) for name, value in self.shared.items()},
            places_BTA=None if self.places_BTA is None else lines.spread(self.places_BTA),
            parents_BT=None,
        )

    def column(self, t: int) -> "Span":
        """The span of column t alone, for code that walks tokens one by one and carries the state between them.

        Local numbers are relative to the state carried in, so a column begins a document (1), goes on with the
        carried one (0), or is padding (-1).
        """
        positions_B1 = self.positions_BT[:, t : t + 1]
        segments_B1 = None
        if self.segments_BT is not None:
            segment_B1 = self.segments_BT[:, t : t + 1]
            segments_B1 = ((segment_B1 > 0) & (positions_B1 == 0)).long() - (segment_B1 < 0).long()
        return replace(
            self,
            positions_BT=positions_B1,
            ids_BT=None if self.ids_BT is None else self.ids_BT[:, t : t + 1],
            segments_BT=segments_B1,
            length_B=positions_B1[:, 0],
            keep=0,
            shared={name: value[:, t : t + 1] for name, value in self.shared.items()},
            places_BTA=None if self.places_BTA is None else self.places_BTA[:, t : t + 1],
        )


def localize(
    segments_BT: Tensor, length_B: Tensor | None = None, segment_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Document ids to local segment numbers and positions, both (B, T) int64.

    segments_BT: any ids >= 0, -1 for padding; a token whose id differs from the last real token's begins a document.
    length_B, segment_B: length and id of the document carried in; a row of length 0 carries none.
    """
    valid_BT = segments_BT >= 0
    if length_B is None:
        length_B = segment_B = segments_BT.new_zeros(segments_BT.shape[0])
    columns_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    real_BT = torch.where(valid_BT, columns_T, -1).cummax(1).values  # the last real column up to here
    previous_BT = torch.cat([torch.full_like(real_BT[:, :1], -1), real_BT[:, :-1]], 1)
    carried_B1 = torch.where(length_B > 0, segment_B, -2)[:, None]  # -2: equal to no id, so a document begins
    previous_id_BT = torch.where(previous_BT >= 0, segments_BT.gather(1, previous_BT.clamp(min=0)), carried_B1)
    starts_BT = valid_BT & (segments_BT != previous_id_BT)
    local_BT = torch.where(valid_BT, starts_BT.long().cumsum(1), -1)
    count_BT = valid_BT.long().cumsum(1)
    before_BT = torch.where(starts_BT, count_BT - 1, -1).cummax(1).values  # real tokens before the document
    before_BT = torch.where(before_BT >= 0, before_BT, -length_B[:, None])
    return local_BT, (count_BT - 1 - before_BT).clamp(min=0)
