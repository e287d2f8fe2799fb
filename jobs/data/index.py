"""Which tokens sample n of a training run has: a pure function of (folder, split, length, seed, n).

The number n counts samples over the whole run, over all workers, so it is the entire cursor: epoch =
n // samples per epoch, and no world size, worker or restart is in it. An epoch is built in three steps,
each local so that reading is:

1. row groups are permuted, and every GROUPS_PER_BUFFER of them are one buffer;
2. the documents of a buffer are permuted; all buffers together are the epoch's stream of tokens;
3. the stream is cut into rows of length+1 tokens, one token shared by neighbours, and the rows that begin
   in a buffer are permuted (neighbouring rows of a long document shall not sit in one batch).

So each token is a target exactly once in an epoch, except the first of a document, which nothing predicts. A
document cut by the edge of a row goes on in another row as a fresh segment. The last row is padded.

Permutations sort hashes of (seed, epoch, level, place): no library's random stream, whose versions differ,
is involved.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from cluster import folder, storage
from jobs.data.shards import checksum

GROUPS_PER_BUFFER = 16
_INSIDE, _FIRST, _PADDING = 0, 1, 2  # marks: inside a document, its first token, behind the stream's end


class _Group(NamedTuple):
    file: str
    number: int
    documents: int
    tokens: int
    crc32: int


class _Epoch(NamedTuple):
    groups: np.ndarray  # numbers of the row groups, in this epoch's order
    start: np.ndarray  # first stream position of each buffer, and the total
    first_row: np.ndarray  # first row that begins in each buffer, and the total


class _Window(NamedTuple):
    order: np.ndarray  # sample of the window -> row of it
    tokens: np.ndarray  # of all its rows, and the last target
    marks: np.ndarray


class Index:
    """Rows of tokens of one split of a prepared folder.

    length: tokens T in a row. seed: any integer. ValueError for arguments that can't be; folder.Damaged,
    naming the file, when tokens are not those that were written. Not for use by several threads at once.
    """

    def __init__(self, place: str, split: str = "train", length: int = 512, seed: int = 0):
        if length < 1:
            raise ValueError(f"length={length}: a row has at least 1 token")
        self._folder = folder.load(place)
        splits = self._folder.meta.get("splits")
        if not splits:
            raise ValueError(f"{place} is not prepared data: make it with `python -m jobs.data`")
        if split not in splits:
            raise ValueError(f"split={split!r}: choose one of {', '.join(splits)}")
        self.length, self.seed, self.split = length, seed, split
        self.vocab: int = self._folder.meta["vocab"]
        self.tokens: int = splits[split]["tokens"]
        self.documents: int = splits[split]["documents"]
        self.targets_per_epoch = self.tokens - self.documents
        self.samples_per_epoch = -(-(self.tokens - 1) // length)
        self._groups = [
            _Group(file["name"], number, *each)
            for file in splits[split]["files"]
            for number, each in enumerate(zip(file["documents"], file["tokens"], file["crc32"], strict=True))
        ]
        self._epochs, self._buffers = _Recent(2), _Recent(2)
        self._windows, self._open = _Recent(2), _Recent(8)

    def rows(self, start: int, count: int) -> dict[str, Tensor]:
        """Samples start .. start+count-1: {"ids_BT", "targets_BT", "segments_BT"}, int64, B = count.

        targets_BT is -100 where the next token is of another document. segments_BT numbers the documents of
        a row from 0; -1 is padding.
        """
        if start < 0 or count < 1:
            raise ValueError(f"start={start}, count={count}: samples are counted from 0, and at least 1 is asked for")
        tokens_BU = np.empty((count, self.length + 1), dtype=np.int64)
        marks_BU = np.empty((count, self.length + 1), dtype=np.uint8)
        done = 0
        while done < count:
            epoch, sample = divmod(start + done, self.samples_per_epoch)
            first_row = self._epoch(epoch).first_row
            at = int(np.searchsorted(first_row, sample, side="right")) - 1
            take = min(count - done, int(first_row[at + 1]) - sample)
            window = self._windows.get((epoch, at), lambda e=epoch, a=at: self._read_window(e, a))
            rows = window.order[sample - first_row[at] :][:take] * self.length
            for source, target in ((window.tokens, tokens_BU), (window.marks, marks_BU)):
                starts = sliding_window_view(source, self.length + 1)  # starts[p] is source[p : p + T + 1]
                target[done : done + take] = starts[rows]
            done += take
        targets_BT = tokens_BU[:, 1:].copy()
        targets_BT[marks_BU[:, 1:] != _INSIDE] = -100
        begins_BT = marks_BU[:, :-1] == _FIRST
        begins_BT[:, 0] = False
        segments_BT = np.cumsum(begins_BT, axis=1, dtype=np.int64)
        segments_BT[marks_BU[:, :-1] == _PADDING] = -1
        ids_BT = np.ascontiguousarray(tokens_BU[:, :-1])
        arrays = {"ids_BT": ids_BT, "targets_BT": targets_BT, "segments_BT": segments_BT}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _epoch(self, epoch: int) -> _Epoch:
        return self._epochs.get(epoch, lambda: self._plan(epoch))

    def _plan(self, epoch: int) -> _Epoch:
        groups = permutation(len(self._groups), self.seed, epoch, 0, 0)
        tokens = np.array([self._groups[g].tokens for g in groups], dtype=np.int64)
        buffers = np.add.reduceat(tokens, np.arange(0, len(tokens), GROUPS_PER_BUFFER))
        start = np.concatenate([[0], np.cumsum(buffers)])
        first_row = np.minimum(-(-start // self.length), self.samples_per_epoch)
        return _Epoch(groups, start, first_row)

    def _read_window(self, epoch: int, at: int) -> _Window:
        """The rows that begin in buffer `at`, with the tokens they need of the buffers behind it."""
        start, first_row = self._epoch(epoch).start, self._epoch(epoch).first_row
        begin, end = first_row[at] * self.length, first_row[at + 1] * self.length + 1
        tokens, marks, reached = [], [], begin
        while reached < min(end, self.tokens):
            more_tokens, more_marks = self._buffers.get((epoch, at), lambda a=at: self._read_buffer(epoch, a))
            tokens.append(more_tokens[reached - start[at] : end - start[at]])
            marks.append(more_marks[reached - start[at] : end - start[at]])
            reached += len(tokens[-1])
            at += 1
        missing = end - reached
        tokens.append(np.zeros(missing, dtype=np.uint16))
        marks.append(np.full(missing, _PADDING, dtype=np.uint8))
        rows = (end - 1 - begin) // self.length
        order = permutation(rows, self.seed, epoch, 2, begin)
        return _Window(order, np.concatenate(tokens), np.concatenate(marks))

    def _read_buffer(self, epoch: int, at: int) -> tuple[np.ndarray, np.ndarray]:
        """A buffer's permuted documents, end to end, and their marks."""
        chosen = self._epoch(epoch).groups[at * GROUPS_PER_BUFFER :][:GROUPS_PER_BUFFER]
        parts, lengths = zip(*(self._read_group(self._groups[g]) for g in chosen), strict=True)
        ids, lengths = np.concatenate(parts), np.concatenate(lengths)
        begins = np.cumsum(lengths) - lengths
        order = permutation(len(lengths), self.seed, epoch, 1, at)
        placed = np.cumsum(lengths[order]) - lengths[order]
        marks = np.zeros(len(ids), dtype=np.uint8)
        marks[placed] = _FIRST
        # the token placed at p comes from p + (where its document lies - where it is placed)
        source = np.arange(len(ids)) + np.repeat(begins[order] - placed, lengths[order])
        return ids[source], marks

    def _read_group(self, group: _Group) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, document lengths) of a row group, checked against the manifest."""
        try:
            file = self._open.get(group.file, lambda: self._open_file(group.file))
            table = file.read_row_group(group.number, columns=["ids"], use_threads=False)
            column = table.column(0).combine_chunks()
            ids, lengths = column.flatten().to_numpy(), np.diff(column.offsets.to_numpy())
            good = checksum(ids, lengths) == group.crc32
        except folder.Damaged:
            raise
        except (OSError, ValueError, KeyError):  # what Parquet says about broken bytes
            good = False
        if not good:
            where = storage.join(self._folder.uri, group.file)
            raise folder.Damaged(f"{where} is damaged: delete its prepared folder, and it is made again")
        return ids, lengths

    def _open_file(self, name: str) -> pq.ParquetFile:
        system, path = storage.filesystem(self._folder.place(name))
        return pq.ParquetFile(system.open_input_file(path))


class _Recent:
    """The `size` results used last, each made once."""

    def __init__(self, size: int):
        self.size, self.kept = size, OrderedDict()

    def get(self, name: Hashable, make: Callable[[], Any]) -> Any:
        if name not in self.kept:
            made = make()
            while len(self.kept) >= self.size:
                self.kept.popitem(last=False)
            self.kept[name] = made
        self.kept.move_to_end(name)
        return self.kept[name]


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. count-1 that the key alone decides: the order of hashed numbers. int64."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(int(part) % 2**64))
    return np.argsort(_mix(state + np.arange(count, dtype=np.uint64)), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """One step of splitmix64: a bijection of 64-bit numbers that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
