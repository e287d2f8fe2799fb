"""Data that is already tensors, such as images and their classes: one sample a row, and the same exact cursor as text.

The rows are split once by a hash of their number and stored in a prepared folder, a file per split. An epoch is a
permutation of the split; sample n of a run is row n % rows of the permutation of epoch n // rows, so every row is seen
exactly once an epoch on any number of workers.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cluster import folder, storage
from jobs.data.index import permutation
from jobs.data.shards import Prepared

VERSION = 1  # of this code: a change of what it writes changes the key


@dataclass(frozen=True)
class Arrays:
    """Rows of tensors. The default needs scikit-learn and no network: 1797 handwritten digits of 8 x 8 pixels."""

    source: Literal["digits", "safetensors"] = "digits"
    """digits: pixels_BCHW of 0 to 16 and labels_B; safetensors: whatever tensors a file has, rows first."""
    path: str = ""
    """File or URI of the source; empty for digits."""
    val_fraction: float = 0.2
    """Share of the rows that is held out."""

    def check(self) -> None:
        """ValueError, one line, for the first field that can't be."""
        if self.source not in ("digits", "safetensors"):
            raise ValueError(f"source={self.source!r}: choose digits or safetensors")
        if self.source == "digits" and self.path:
            raise ValueError(f"path={self.path!r}: source 'digits' has no path; set source to safetensors")
        if self.source == "safetensors" and not self.path:
            raise ValueError("path is empty: source 'safetensors' needs a file or URI")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: it has to be above 0 and below 1")


def prepare(data: Arrays) -> Prepared:
    """Finds or makes the prepared folder in EDIFICE_HOME/data; it has no tokenizer. ValueError for bad input."""
    data.check()
    place = storage.join(storage.home(), "data", key(data))
    if not folder.complete(place):
        tensors = _digits() if data.source == "digits" else _safetensors(data.path)
        rows = len(next(iter(tensors.values())))
        held_out = round(rows * data.val_fraction)
        if not 0 < held_out < rows:
            raise ValueError(
                f"val_fraction={data.val_fraction}: of {rows} rows it takes {held_out}; some, not all, must go"
            )
        order = torch.from_numpy(permutation(rows, 0))
        parts = {"val": order[:held_out].sort().values, "train": order[held_out:].sort().values}
        files = {f"{s}.safetensors": {n: t[part].contiguous() for n, t in tensors.items()} for s, part in parts.items()}
        folder.write(place, files, {"rows": {split: len(part) for split, part in parts.items()}})
    return Prepared(place, "", 0)


def key(data: Arrays) -> str:
    """Name of the prepared folder: the source, and a hash of all that decides the content."""
    spec = dataclasses.asdict(data) | {"version": VERSION}
    if data.path:
        there = storage.info(data.path)
        if there is None or there.is_folder:
            raise ValueError(f"path={data.path!r} is no file: give a .safetensors file or its URI")
        path = data.path if storage.is_uri(data.path) else storage.join(*storage.split(data.path))
        spec |= {"path": path, "size": there.size, "mtime": there.mtime_ns}
    return f"{data.source}-{hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]}"


def _digits() -> dict[str, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "source='digits' is a data set of scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    found = load_digits()
    return {
        "pixels_BCHW": torch.from_numpy(found.images.astype(np.uint8))[:, None],
        "labels_B": torch.from_numpy(found.target.astype(np.int64)),
    }


def _safetensors(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(storage.read(path))
    except SafetensorError as error:
        raise ValueError(f"path={path!r} is not a safetensors file ({str(error).splitlines()[0]})") from None
    rows = {name: len(tensor) if tensor.dim() else 0 for name, tensor in tensors.items()}
    if not rows or len(set(rows.values())) > 1 or not min(rows.values()):
        raise ValueError(f"path={path!r}: its tensors must have the same number of rows, at least 1; they have {rows}")
    return tensors


class ArrayIndex:
    """Rows of one split of a prepared folder, with the interface of `jobs.data.index.Index`.

    ValueError for arguments that can't be; folder.Damaged, naming the file, when it is not what was written.
    """

    def __init__(self, place: str, split: str = "train", seed: int = 0) -> None:
        stored = folder.load(place)
        splits = stored.meta.get("rows")
        if not splits:
            raise ValueError(f"{place} is not prepared rows of tensors")
        if split not in splits:
            raise ValueError(f"split={split!r}: choose one of {', '.join(splits)}")
        self.seed, self.split = seed, split
        self.tensors = stored.tensors(f"{split}.safetensors")
        self.samples_per_epoch: int = splits[split]

    def rows(self, start: int, count: int) -> dict[str, Tensor]:
        """Samples start .. start+count-1 of the run, each tensor with B = count."""
        if start < 0 or count < 1:
            raise ValueError(f"start={start}, count={count}: samples are counted from 0, and at least 1 is asked for")
        chosen = torch.empty(count, dtype=torch.int64)
        done = 0
        while done < count:
            epoch, sample = divmod(start + done, self.samples_per_epoch)
            take = min(count - done, self.samples_per_epoch - sample)
            order = permutation(self.samples_per_epoch, self.seed, epoch, 3)[sample : sample + take]
            chosen[done : done + take] = torch.from_numpy(order)
            done += take
        return {name: tensor[chosen] for name, tensor in self.tensors.items()}
