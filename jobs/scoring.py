"""How likely a language model finds text: sums of nats, over rows with a fresh state or over whole documents.

Rows are what training reads: `length` tokens, several documents packed, one that is cut going on as if it began there.
Whole documents carry their state from chunk to chunk, so every token is predicted from all of the document before it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.decoder import Decoder
from models.model import Batch, Model

WINDOW = 8  # batches of documents that are sorted by length, so that a batch has little padding


class Score(NamedTuple):
    """nats: summed over `tokens` predicted tokens, which stand for `bytes` bytes of text. rows: or documents."""

    nats: float = 0.0
    tokens: int = 0
    bytes: float = 0.0
    rows: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


class Tokens(NamedTuple):
    """A document: ids_N int64 with its first and last special token, and the bytes of text each stands for, float64."""

    ids_N: np.ndarray
    bytes_N: np.ndarray


@torch.no_grad()
def score_rows(model: Model, batch: Batch, bytes_BT: Tensor) -> Score:
    """Of a batch as training has it. bytes_BT: bytes that each target stands for."""
    batch = {name: value.to(_device(model)) for name, value in batch.items()}
    weight = model.weight(batch)
    loss, metrics = model(batch)
    real_BT = batch["targets_BT"].cpu() != -100
    nats = float(metrics.get("loss", loss).double() * weight)
    return Score(nats, int(weight), float(bytes_BT[real_BT].sum()), len(real_BT))


@torch.no_grad()
def score_documents(model: Decoder, documents: list[Tokens], chunk: int) -> Score:
    """Of whole documents, a row each, `chunk` tokens in one call."""
    sizes = [len(document.ids_N) - 1 for document in documents]
    ids_BT = torch.zeros(len(documents), max(sizes), dtype=torch.int64)
    targets_BT, segments_BT = torch.full_like(ids_BT, -100), torch.full_like(ids_BT, -1)
    for row, (document, size) in enumerate(zip(documents, sizes, strict=True)):
        ids_N = torch.from_numpy(document.ids_N)
        ids_BT[row, :size], targets_BT[row, :size], segments_BT[row, :size] = ids_N[:-1], ids_N[1:], 0
    state, nats = model.init_state(len(documents), max(sizes)), 0.0
    for start in range(0, max(sizes), chunk):
        parts = (tensor[:, start : start + chunk].to(_device(model)) for tensor in (ids_BT, segments_BT, targets_BT))
        ids_Bt, segments_Bt, targets_Bt = parts
        x_BtD, at, state = model.hidden(ids_Bt, state, segments_Bt)
        losses_Bt, _ = model.head(x_BtD, at, targets_BT=targets_Bt)
        nats += float(losses_Bt.double().sum())
    return Score(nats, sum(sizes), float(sum(document.bytes_N[1:].sum() for document in documents)), len(documents))


def rows_of(documents: Iterator[Tokens], length: int, batch: int) -> Iterator[tuple[Batch, Tensor]]:
    """Documents end to end, cut into rows of `length` tokens: (batch as `jobs.data.index` has it, bytes_BT)."""
    rows = []
    for row in _rows(documents, length):
        rows.append(row)
        if len(rows) == batch:
            yield _batch(rows)
            rows = []
    if rows:
        yield _batch(rows)


def batches_of(documents: Iterator[Tokens], batch: int) -> Iterator[list[Tokens]]:
    """Documents in batches of similar length."""
    window = []
    for document in documents:
        window.append(document)
        if len(window) == batch * WINDOW:
            yield from _sorted(window, batch)
            window = []
    yield from _sorted(window, batch)


def _sorted(window: list[Tokens], batch: int) -> Iterator[list[Tokens]]:
    window = sorted(window, key=lambda document: len(document.ids_N))
    yield from (window[start : start + batch] for start in range(0, len(window), batch))


def _rows(documents: Iterator[Tokens], length: int) -> Iterator[np.ndarray]:
    """Rows of length + 1 columns, neighbours sharing one: (3, length + 1) of id, document (-1: padding), bytes."""
    held, size = [], 0
    for number, document in enumerate(documents):
        held.append(np.stack([document.ids_N, np.full(len(document.ids_N), number), document.bytes_N]))
        size += len(document.ids_N)
        if size > length:
            stream = np.concatenate(held, 1)
            last = (size - 1) // length * length
            yield from (stream[:, start : start + length + 1] for start in range(0, last, length))
            held, size = [stream[:, last:]], size - last
    if size > 1:
        padding = np.tile([[0.0], [-1.0], [0.0]], length + 1 - size)
        yield np.concatenate([*held, padding], 1)


def _batch(rows: list[np.ndarray]) -> tuple[Batch, Tensor]:
    ids_BU, documents_BU, bytes_BU = (torch.from_numpy(each) for each in np.stack(rows, 1))
    ids_BU, documents_BU = ids_BU.long(), documents_BU.long()
    same_BT = (documents_BU[:, 1:] == documents_BU[:, :-1]) & (documents_BU[:, 1:] >= 0)
    batch = {
        "ids_BT": ids_BU[:, :-1].contiguous(),
        "targets_BT": torch.where(same_BT, ids_BU[:, 1:], -100),
        "segments_BT": documents_BU[:, :-1].contiguous(),
    }
    return batch, bytes_BU[:, 1:]


def _device(model: Model) -> torch.device:
    return next(model.parameters()).device
