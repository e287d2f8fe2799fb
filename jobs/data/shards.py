"""Documents -> tokens -> Parquet shards, once: the prepared folder of a corpus.

A row is a document, <|bos|> tokens <|eos|>; train/ and val/ are split by a hash of the document's name. The
folder's name is a hash of everything that decides its content, so a second call finds it. Its content
follows from its name, each file appears whole, and the manifest comes last: a killed preparation is not a
folder, and two at once write the same bytes.
"""

import dataclasses
import hashlib
import json
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import folder, storage
from jobs.data import tokenizer as tokenizers
from jobs.data.config import Data
from jobs.data.documents import Document, documents, fingerprint
from jobs.data.progress import Progress

VERSION = 1  # of this code: a change of what it writes changes the key
GROUP_TOKENS = 1 << 18  # a row group closes when it reaches this
GROUPS_PER_FILE = 64
_BATCH_BYTES = 1 << 20


class Prepared(NamedTuple):
    """A prepared corpus: its folder, the tokenizer.json in it, and how many classes a model needs."""

    folder: str
    tokenizer: str
    vocab: int


def prepare(data: Data, quiet: bool = False) -> Prepared:
    """Finds or makes the prepared folder of a corpus in EDIFICE_HOME/data. ValueError for bad input."""
    data.check()
    place = storage.join(storage.home(), "data", key(data))
    if not folder.complete(place):
        _make(data, place, quiet)
    found = folder.load(place)
    return Prepared(place, storage.join(place, "tokenizer.json"), found.meta["vocab"])


def key(data: Data) -> str:
    """Name of the prepared folder: the source, and a hash of all that decides the content."""
    own = storage.read(data.tokenizer) if data.tokenizer else b""
    spec = dataclasses.asdict(data) | {"tokenizer": hashlib.sha256(own).hexdigest()}
    if data.tokenizer:
        spec.pop("vocab"), spec.pop("tokenizer_bytes")
    if data.path and not storage.is_uri(data.path):
        spec["path"] = storage.join(*storage.split(data.path))
    spec |= {"version": VERSION, "files": fingerprint(data), "group": [GROUP_TOKENS, GROUPS_PER_FILE]}
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    return f"{data.source}-{digest[:16]}"


def encode_texts(tokenizer_json: str, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text; what a Ray task runs."""
    return tokenizers.encode_batch(_tokenizer(tokenizer_json), texts)


@lru_cache(maxsize=2)
def _tokenizer(tokenizer_json: str):
    return tokenizers.parse(tokenizer_json)


def _make(data: Data, place: str, quiet: bool) -> None:
    scan = _Scan(data)
    with Progress("read" if data.tokenizer else "read, train the tokenizer", quiet=quiet) as progress:
        texts = scan.texts(progress)
        if data.tokenizer:
            tokenizer = tokenizers.load(data.tokenizer)
        else:
            tokenizer = tokenizers.train(_first(texts, data.tokenizer_bytes), data.vocab)
        for _ in texts:
            pass
    bos, eos = (tokenizers.special(tokenizer, token) for token in (data.bos, data.eos))
    vocab = tokenizers.size(tokenizer)
    if not data.tokenizer and vocab < data.vocab and not quiet:
        print(
            f"the tokenizer has {vocab} entries, not {data.vocab}: the text has no more pairs",
            file=sys.stderr,
        )
    text = tokenizer.to_str()
    writers = {split: _Writer(place, split, bos, eos, vocab) for split in ("train", "val")}
    with Progress("encode", scan.bytes, quiet=quiet) as progress:
        for split, document, ids in _encoded(_with_split(data, scan), text):
            writers[split].add(document, ids)
            progress.add(len(document.text.encode()))
    splits = {split: writer.finish() for split, writer in writers.items()}
    entries = [entry for writer in writers.values() for entry in writer.entries]
    if folder.complete(place):  # somebody else was faster; what had to make way for their files goes
        for entry in entries:
            if entry["file"] != entry["name"]:
                storage.delete(storage.join(place, entry["file"]))
        return
    entries.append(folder.put(place, "tokenizer.json", text))
    meta = {"splits": splits, "vocab": vocab, "bos": bos, "eos": eos, "data": dataclasses.asdict(data)}
    folder.seal(place, entries, meta)


class _Scan:
    """The first pass over the documents: how many, how long, and the two names that decide an even split."""

    def __init__(self, data: Data):
        self.data = data
        self.count = self.bytes = 0
        self.lowest = self.highest = (0, "")

    def texts(self, progress: Progress) -> Iterator[str]:
        for document in documents(self.data):
            rank = (_hash(document.name), document.name)
            self.lowest = min(self.lowest, rank) if self.count else rank
            self.highest = max(self.highest, rank) if self.count else rank
            self.count += 1
            length = len(document.text.encode())
            self.bytes += length
            progress.add(length)
            yield document.text


def _first(texts: Iterator[str], limit: int) -> Iterator[str]:
    taken = 0
    for text in texts:
        taken += len(text.encode())
        yield text
        if taken >= limit:
            return


def _hash(name: str) -> float:
    """A number in [0, 1) that only the name decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def _with_split(data: Data, scan: _Scan) -> Iterator[tuple[str, Document]]:
    """Each document with its split. The lowest hash is always val, the highest train: neither is empty."""
    if scan.count == 1:
        yield from _halves(next(documents(data)), data)
        return
    for document in documents(data):
        rank = (_hash(document.name), document.name)
        held_out = rank == scan.lowest or (rank[0] < data.val_fraction and rank != scan.highest)
        yield "val" if held_out else "train", document


def _halves(document: Document, data: Data) -> Iterator[tuple[str, Document]]:
    """A corpus of one document: its end is held out, from the start of a line where there is one."""
    text = document.text
    if len(text) < 2:
        raise ValueError(f"the source is one document of {len(text)} character: there is nothing to hold out")
    cut = min(max(round(len(text) * (1 - data.val_fraction)), 1), len(text) - 1)
    cut = text.rfind("\n", 0, cut) + 1 or cut
    yield "train", Document(document.name + "#train", text[:cut])
    yield "val", Document(document.name + "#val", text[cut:])


def _encoded(rows: Iterable[tuple[str, Document]], tokenizer_json: str) -> Iterator[tuple[str, Document, np.ndarray]]:
    """Adds ids to (split, document), in order: in Ray tasks when Ray runs, else in this process."""
    waiting: deque = deque()
    start, finish, depth = _encoder(tokenizer_json)

    def oldest():
        batch, counts, handle = waiting.popleft()
        ids = iter(finish(handle))
        for (split, document), count in zip(batch, counts, strict=True):
            yield split, document, np.concatenate([next(ids) for _ in range(count)])

    for batch in _batches(rows):
        pieces = [_pieces(document.text) for _, document in batch]
        waiting.append((batch, [len(p) for p in pieces], start([piece for p in pieces for piece in p])))
        if len(waiting) >= depth:
            yield from oldest()
    while waiting:
        yield from oldest()


def _encoder(tokenizer_json: str):
    """(start a batch, wait for it, how many at once)."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return (lambda texts: encode_texts(tokenizer_json, texts)), (lambda ids: ids), 1
    # no CPU is reserved: a job that holds them all would wait for itself
    task = ray.remote(num_cpus=0)(encode_texts)
    shared = ray.put(tokenizer_json)
    depth = max(2, int(ray.cluster_resources().get("CPU", 1)))
    return (lambda texts: task.remote(shared, texts)), ray.get, depth


def _batches(rows: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch, length = [], 0
    for row in rows:
        batch.append(row)
        length += len(row[1].text)
        if length >= _BATCH_BYTES:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> list[str]:
    """A long text cut after line ends: bounds the memory of encoding, and lets threads share one file."""
    pieces, start = [], 0
    while len(text) - start > _BATCH_BYTES:
        stop = text.rfind("\n", start, start + _BATCH_BYTES) + 1 or start + _BATCH_BYTES
        pieces.append(text[start:stop])
        start = stop
    return pieces + [text[start:]]


class _Writer:
    """Parquet files of one split; a row group is bounded, and its crc32 goes to the manifest."""

    def __init__(self, place: str, split: str, bos: int, eos: int, vocab: int):
        self.place, self.split, self.ends = place, split, (bos, eos)
        self.dtype = np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32)
        self.schema = pa.schema(
            {
                "ids": pa.list_(pa.from_numpy_dtype(self.dtype)),
                "length": pa.int64(),
                "bytes": pa.int64(),
                "name": pa.string(),
            }
        )
        self.entries: list[dict] = []
        self.files: list[dict] = []
        self.bytes = 0
        self.sink = None
        self._empty()

    def add(self, document: Document, ids: np.ndarray) -> None:
        bos, eos = self.ends
        self.ids.append(np.concatenate([[bos], ids, [eos]]).astype(self.dtype))
        self.tokens += len(ids) + 2
        self.names.append(document.name)
        self.sizes.append(len(document.text.encode()))
        if self.tokens >= GROUP_TOKENS:
            self._close_group()

    def finish(self) -> dict:
        """Writes what is left; returns what the manifest says about this split."""
        if self.ids:
            self._close_group()
        if self.sink:
            self._close_file()
        tokens = sum(sum(file["tokens"]) for file in self.files)
        count = sum(sum(file["documents"]) for file in self.files)
        return {"documents": count, "tokens": tokens, "bytes": self.bytes, "files": self.files}

    def _empty(self) -> None:
        self.ids, self.names, self.sizes, self.tokens = [], [], [], 0

    def _close_group(self) -> None:
        if self.sink is None:
            self.sink = pa.BufferOutputStream()
            self.parquet = pq.ParquetWriter(self.sink, self.schema, compression="zstd")
            name = f"{self.split}/part-{len(self.files):05d}.parquet"
            self.files.append({"name": name, "documents": [], "tokens": [], "crc32": []})
        lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)
        flat = np.concatenate(self.ids)
        if len(flat) >= 1 << 31:
            raise ValueError(f"document {self.names[-1]} is too long for a row (2^31 tokens): cut the file in pieces")
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        columns = [
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)),
            pa.array(lengths),
            pa.array(self.sizes, pa.int64()),
            pa.array(self.names),
        ]
        self.parquet.write_table(pa.table(columns, schema=self.schema), row_group_size=len(lengths))
        file = self.files[-1]
        file["documents"].append(len(lengths))
        file["tokens"].append(len(flat))
        file["crc32"].append(checksum(flat, lengths))
        self.bytes += sum(self.sizes)
        self._empty()
        if len(file["tokens"]) == GROUPS_PER_FILE:
            self._close_file()

    def _close_file(self) -> None:
        self.parquet.close()
        self.entries.append(folder.put(self.place, self.files[-1]["name"], self.sink.getvalue().to_pybytes()))
        self.sink = None


def checksum(ids: np.ndarray, lengths: np.ndarray) -> int:
    """crc32 of a row group's tokens and document lengths, as a reader has them in hand."""
    return zlib.crc32(np.ascontiguousarray(lengths, dtype="<i8"), zlib.crc32(np.ascontiguousarray(ids)))
