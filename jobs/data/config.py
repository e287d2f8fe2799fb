"""What text to train on, and how to cut it into tokens: every field of `Data`."""

from dataclasses import dataclass
from typing import Literal

SOURCES = ("stdlib", "text", "jsonl", "parquet")


@dataclass(frozen=True)
class Data:
    """A corpus. The default needs nothing: the source code of Python's own standard library."""

    source: Literal["stdlib", "text", "jsonl", "parquet"] = "stdlib"
    """stdlib: Python's own; text: one document a file; jsonl: one a line; parquet: one a row."""
    path: str = ""
    """File, folder, glob (with * ? **) or URI of the source; empty for stdlib."""
    field: str = "text"
    """Where a JSONL line or a Parquet row holds its text."""
    limit_bytes: int = 0
    """Stop after the document that reaches this many bytes of text; 0 takes everything."""
    tokenizer: str = ""
    """An existing tokenizer.json (path or URI) to use; empty trains a byte-level BPE on the source."""
    vocab: int = 4096
    """Entries of the tokenizer to train, special tokens and 256 bytes included."""
    tokenizer_bytes: int = 100_000_000
    """The tokenizer is trained on the first documents, until they reach this many bytes."""
    bos: str = "<|bos|>"
    """The special token that opens every document."""
    eos: str = "<|eos|>"
    """The special token that closes every document."""
    val_fraction: float = 0.05
    """Share of the documents that is held out, chosen by a hash of their names."""

    def check(self) -> None:
        """ValueError, one line, for the first field that can't be."""
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r}: choose one of {', '.join(SOURCES)}")
        if self.source == "stdlib" and self.path:
            raise ValueError(f"path={self.path!r}: source 'stdlib' has no path; set source to text, jsonl or parquet")
        if self.source != "stdlib" and not self.path:
            raise ValueError(f"path is empty: source {self.source!r} needs a file, folder, glob or URI")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: it has to be above 0 and below 1")
        if self.limit_bytes < 0:
            raise ValueError(f"limit_bytes={self.limit_bytes}: it has to be 0 (no limit) or more")
        if self.tokenizer_bytes < 1:
            raise ValueError(f"tokenizer_bytes={self.tokenizer_bytes}: it has to be at least 1")
