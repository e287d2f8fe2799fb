"""How well a model predicts text: `python -m jobs.evaluate RUN_OR_MODEL [--rows N] [--length N] [--data.source ...]`.

A run is evaluated on the text it has held out, in the rows its own validation reads; with --data.* any model is, on any
text, JSONL or Parquet. Printed are nats per token, perplexity and bits per byte, which alone compares models of
different tokenizers. --carry reads whole documents with the state carried on, instead of rows that begin anew.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cluster import folder, storage
from jobs import cli, given, scoring
from jobs.config import Job, from_json
from jobs.data import Arrays, Chats, Data, index_of, prepare
from jobs.data import tokenizer as tokenizers
from jobs.data.documents import documents
from models.model import Batch, Model

PROGRAM = "jobs.evaluate"
USAGE = f"usage: python -m {PROGRAM} RUN_OR_MODEL [--data.source text --data.path FILES] [--option value ...]"
_TEXTS = 64  # documents that are encoded at once


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate on, and how."""

    data: Data = field(default_factory=Data)
    """The text. Left alone: what a run has held out; for a model folder the standard library."""
    rows: int = 0
    """Rows to read, with --carry documents; 0 reads all."""
    length: int = 0
    """Tokens of a row, with --carry of a chunk; 0: as the run was trained, for a model folder 512."""
    batch: int = 8
    """Rows of one call."""
    carry: bool = False
    """Read whole documents, the state carried from chunk to chunk."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What is computed in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when there is one."""
    json: bool = False
    """Print one line of JSON."""


def evaluate(name: str, wanted: Evaluation, own: bool = False, quiet: bool = False) -> dict[str, Any]:
    """The figures of a model. own: on what the run has held out. ValueError, one line, for what a user can mend."""
    for field_ in ("rows", "length"):
        if getattr(wanted, field_) < 0:
            raise ValueError(f"{field_}={getattr(wanted, field_)}: must be at least 0")
    if wanted.batch < 1:
        raise ValueError(f"batch={wanted.batch}: must be at least 1")
    found = given.find(name)
    job = from_json(found.job) if found.job else None
    model = _placed(_language_model(given.load(found), name), wanted)
    wanted = replace(wanted, length=wanted.length or (job.length if job else 512))
    if own and job:
        work, total, what = _held_out(job, wanted)
    else:
        work, total, what = _text(found, wanted, model.config.vocab)
    began, score, shown = time.monotonic(), scoring.Score(), time.monotonic()
    for item in work:
        if wanted.carry:
            score += scoring.score_documents(model, item, wanted.length)
        else:
            score += scoring.score_rows(model, *item)
        if not quiet and time.monotonic() - shown >= 2:
            shown = time.monotonic()
            _progress(score, total, shown - began, "documents" if wanted.carry else "rows")
    if not score.tokens:
        raise ValueError(f"{what}: there is no token to predict")
    nats, seconds = score.nats / score.tokens, time.monotonic() - began
    return {
        "model": found.place,
        "data": what,
        "documents" if wanted.carry else "rows": score.rows,
        "length": wanted.length,
        "tokens": score.tokens,
        "bytes": round(score.bytes),
        "nats_per_token": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": score.nats / math.log(2) / score.bytes if score.bytes else math.nan,
        "tokens_per_s": score.tokens / max(seconds, 1e-9),
        "seconds": seconds,
    }


def _language_model(model: Model, name: str) -> Model:
    from models.decoder import Decoder

    if not isinstance(model, Decoder) or not model.causal:
        raise ValueError(f"{name}: {type(model).__name__} is not a causal decoder, so it has no perplexity")
    other = model.example(1).keys() - {"ids_BT", "targets_BT", "segments_BT"}
    if other:
        raise ValueError(f"{name}: {type(model).__name__} wants {', '.join(sorted(other))} besides text")
    return model


def _placed(model: Model, wanted: Evaluation) -> Model:
    if wanted.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: this machine has no GPU that torch can use; set --device cpu")
    use_gpu = wanted.device != "cpu" and torch.cuda.is_available()
    return model.to("cuda" if use_gpu else "cpu", torch.bfloat16 if wanted.precision == "bf16" else torch.float32)


def _progress(score: scoring.Score, total: int, seconds: float, unit: str) -> None:
    left = f", {seconds / score.rows * (total - score.rows):.0f} s left" if total else ""
    of = f" of {total:,}" if total else ""
    print(
        f"evaluate: {score.rows:,}{of} {unit}, {score.nats / max(score.tokens, 1):.4f} nats/token, "
        f"{score.tokens / seconds:,.0f} tokens/s{left}",
        file=sys.stderr,
        flush=True,
    )


# -- what is read: an iterator of batches, how many rows or documents there are (0: unknown), and its name ------------


def _held_out(job: Job, wanted: Evaluation) -> tuple[Iterator, int, str]:
    """The held-out part of a run's own data."""
    if isinstance(job.data, Arrays) or (wanted.carry and isinstance(job.data, Chats)):
        raise ValueError(f"data of source {job.data.source!r} is not evaluated this way; give --data.source text")
    prepared, what = prepare(job.data), f"held out by run {job.name}"
    bytes_C = tokenizers.token_bytes(tokenizers.load(prepared.tokenizer)).double()
    if not wanted.carry:
        index = index_of(prepared, "val", wanted.length)
        count = min(wanted.rows or index.samples_per_epoch, index.samples_per_epoch)
        return _index_rows(index, count, wanted.batch, bytes_C), count, what
    stored = folder.load(prepared.folder)
    count = stored.meta["splits"]["val"]["documents"]
    count = min(wanted.rows or count, count)
    return scoring.batches_of(_first(_stored(stored, bytes_C.numpy()), count), wanted.batch), count, what


def _index_rows(index: Any, count: int, batch: int, bytes_C: Tensor) -> Iterator[tuple[Batch, Tensor]]:
    for start in range(0, count, batch):
        rows = index.rows(start, min(batch, count - start))
        yield rows, bytes_C[rows["targets_BT"].clamp(min=0)]


def _stored(stored: folder.Folder, bytes_C: np.ndarray) -> Iterator[scoring.Tokens]:
    """Held-out documents of a prepared folder, in the order of its files."""
    for name in stored.names:
        if name.startswith("val/"):
            system, path = storage.filesystem(stored.check(name))
            with system.open_input_file(path) as opened:
                for group in pq.ParquetFile(opened).iter_batches(batch_size=_TEXTS, columns=["ids"], use_threads=False):
                    for row in group.column(0):
                        ids_N = row.values.to_numpy().astype(np.int64)
                        yield scoring.Tokens(ids_N, bytes_C[ids_N])


def _text(found: given.Given, wanted: Evaluation, vocab: int) -> tuple[Iterator, int, str]:
    """Any text, in the tokens of the model."""
    wanted.data.check()
    if wanted.data.tokenizer:
        tokenizer = tokenizers.load(wanted.data.tokenizer)
    elif found.tokenizer is None:
        raise ValueError(f"{found.place}: has no tokenizer.json; give one with --data.tokenizer")
    else:
        tokenizer = tokenizers.parse(found.tokenizer, f"{found.place}/tokenizer.json")
    if tokenizers.size(tokenizer) > vocab:
        raise ValueError(
            f"data.tokenizer: it has {tokenizers.size(tokenizer)} classes, the model {vocab}; give its own"
        )
    texts = _encoded(wanted.data, tokenizer)
    what = wanted.data.path or wanted.data.source
    if wanted.carry:
        return scoring.batches_of(_first(texts, wanted.rows), wanted.batch), wanted.rows, what
    rows = scoring.rows_of(texts, wanted.length, wanted.batch)
    return _first_rows(rows, wanted.rows), wanted.rows, what


def _encoded(data: Data, tokenizer: Any) -> Iterator[scoring.Tokens]:
    """The documents of a source. Where tokens are not bytes, a document's bytes are spread evenly over its tokens."""
    bos, eos = (tokenizers.special(tokenizer, token) for token in (data.bos, data.eos))
    try:
        bytes_C = tokenizers.token_bytes(tokenizer).double().numpy()
    except ValueError:
        bytes_C = None
    held: list[str] = []

    def encode() -> Iterator[scoring.Tokens]:
        for text, ids in zip(held, tokenizers.encode_batch(tokenizer, held), strict=True):
            ids_N = np.concatenate([[bos], ids, [eos]]).astype(np.int64)
            if bytes_C is not None:
                yield scoring.Tokens(ids_N, bytes_C[ids_N])
            else:
                bytes_N = np.full(len(ids_N), len(text.encode()) / max(len(ids), 1))
                bytes_N[[0, -1]] = 0
                yield scoring.Tokens(ids_N, bytes_N)

    for document in documents(data):
        held.append(document.text)
        if len(held) == _TEXTS:
            yield from encode()
            held = []
    yield from encode()


def _first(items: Iterator, count: int) -> Iterator:
    """The first `count` items; all for 0."""
    for number, item in enumerate(items, 1):
        yield item
        if number == count:
            return


def _first_rows(batches: Iterator[tuple[Batch, Tensor]], count: int) -> Iterator[tuple[Batch, Tensor]]:
    """The first `count` rows; all for 0."""
    left = count or math.inf
    for batch, bytes_BT in batches:
        keep = int(min(left, len(bytes_BT)))
        yield {name: value[:keep] for name, value in batch.items()}, bytes_BT[:keep]
        left -= keep
        if left <= 0:
            return


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        if not arguments or arguments[0] not in ("-h", "--help"):
            cli.fail(f"the first word has to be a run or a model folder; {USAGE}")
        print(f"{USAGE}\n\noptions: python -m {PROGRAM} RUN_OR_MODEL --help")
        raise SystemExit(0)
    own = not any(argument.startswith("--data.") for argument in arguments)
    try:
        wanted = cli.override(Evaluation(), f"python -m {PROGRAM} RUN_OR_MODEL", arguments[1:])
        figures = evaluate(arguments[0], wanted, own)
    except (ValueError, OSError) as error:
        cli.fail(error)
    if wanted.json:
        print(json.dumps(figures))
        return
    count = "documents" if wanted.carry else "rows"
    print(f"model       {figures['model']}")
    print(f"data        {figures['data']}: {figures[count]:,} {count}, {figures['tokens']:,} tokens")
    print(f"nats/token  {figures['nats_per_token']:.4f}")
    print(f"perplexity  {figures['perplexity']:.2f}")
    print(f"bits/byte   {figures['bits_per_byte']:.4f}")
    print(f"speed       {figures['tokens_per_s']:,.0f} tokens/s")


if __name__ == "__main__":
    main(sys.argv[1:])
