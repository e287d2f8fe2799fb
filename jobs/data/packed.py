"""Rows of whole conversations: what sample n of a run has is a pure function of (folder, split, length, seed, n).

Conversations are put into rows once, longest first, each into the fullest row that still has room; an epoch permutes
the rows. So a conversation is never separated from its beginning and is seen once in an epoch. One that is longer than
a row loses its end; when nothing that is to be learnt is left of it, it is left out.
"""

from bisect import bisect_left, insort

import numpy as np
import torch
from torch import Tensor

from cluster import folder
from jobs.data.index import permutation


class Packed:
    """Rows of `length` tokens of a split of a folder made by `jobs.data.chat.prepare`.

    cut: conversations longer than a row. ValueError for arguments that can't be. Not for several threads at once.
    """

    def __init__(self, place: str, split: str = "train", length: int = 512, seed: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length={length}: a row has at least 1 token")
        tensors = folder.load(place).tensors(f"{split}.safetensors")
        self._ids_N, self._learn_N = tensors["ids_N"].numpy(), tensors["learn_N"].numpy()
        starts_K = tensors["starts_K"].numpy()
        # a conversation of n tokens takes n - 1 columns: its last token is a target only
        self._spans = [(int(a), int(min(b, a + length + 1))) for a, b in zip(starts_K[:-1], starts_K[1:])]
        kept = [n for n, (a, b) in enumerate(self._spans) if self._learn_N[a + 1 : b].any()]
        if not kept:
            raise ValueError(f"length={length}: no answer of the assistant begins within a row; raise --length")
        self.length, self.seed, self.tokens = length, seed, int(starts_K[-1])
        self.cut = int((np.diff(starts_K) > length + 1).sum())
        self._rows = pack({n: self._spans[n][1] - self._spans[n][0] - 1 for n in kept}, length)
        self.samples_per_epoch = len(self._rows)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows(self, start: int, count: int) -> dict[str, Tensor]:
        """Samples start .. start+count-1: {"ids_BT", "targets_BT", "segments_BT"}, int64, B = count.

        targets_BT is -100 where the next token is not the assistant's. segments_BT numbers the conversations of a row
        from 0; -1 is padding.
        """
        if start < 0 or count < 1:
            raise ValueError(f"start={start}, count={count}: samples are counted from 0, and at least 1 is asked for")
        ids_BT = np.zeros((count, self.length), dtype=np.int64)
        targets_BT, segments_BT = np.full_like(ids_BT, -100), np.full_like(ids_BT, -1)
        for n in range(count):
            place = 0
            for segment, conversation in enumerate(self._rows[self._row(start + n)]):
                begin, end = self._spans[conversation]
                columns = slice(place, place := place + end - begin - 1)
                ids_BT[n, columns] = self._ids_N[begin : end - 1]
                targets_BT[n, columns] = np.where(self._learn_N[begin + 1 : end], self._ids_N[begin + 1 : end], -100)
                segments_BT[n, columns] = segment
        arrays = {"ids_BT": ids_BT, "targets_BT": targets_BT, "segments_BT": segments_BT}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _row(self, sample: int) -> int:
        epoch, place = divmod(sample, self.samples_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.samples_per_epoch, self.seed, epoch)
        return int(self._order[place])


def pack(sizes: dict[int, int], length: int) -> list[list[int]]:
    """Numbers in rows whose sizes sum to `length` at most: best fit, largest first. No size is above `length`."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free columns, row), sorted
    for number in sorted(sizes, key=lambda n: (-sizes[n], n)):
        at = bisect_left(rooms, (sizes[number], -1))
        if at == len(rooms):
            rows.append([])
            room, row = length, len(rows) - 1
        else:
            room, row = rooms.pop(at)
        rows[row].append(number)
        insort(rooms, (room - sizes[number], row))
    return rows
