"""Sources of text, each as a stream of documents in an order that no machine changes.

A document's name is relative to the source (`asyncio/base_events.py`, `part.jsonl:17`), so that what
depends on names, the split into train and val, is the same wherever the source lies.
"""

import glob
import io
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

from cluster import storage
from jobs.data.config import Data

_STDLIB_WITHOUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_ENDINGS = {"text": "", "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"), "parquet": ".parquet"}


class Document(NamedTuple):
    name: str
    text: str


class File(NamedTuple):
    name: str
    place: str
    size: int
    mtime_ns: int


def documents(data: Data) -> Iterator[Document]:
    """Every non-empty document of the source, in the order of file names.

    ValueError in one line: nothing at the path, no documents, a missing field, text that is not UTF-8, a
    bad JSONL line (named file:line).
    """
    read = {"stdlib": _stdlib, "text": _text, "jsonl": _jsonl, "parquet": _parquet}[data.source]
    taken = count = 0
    for file in files(data):
        for document in read(file, data.field):
            if not document.text:
                continue
            yield document
            count += 1
            taken += len(document.text.encode())
            if data.limit_bytes and taken >= data.limit_bytes:
                return
    if not count:
        raise ValueError(f"path={data.path!r} has no text: every {data.source} document in it is empty")


def files(data: Data) -> list[File]:
    """The files of the source, sorted by name."""
    found = _stdlib_files() if data.source == "stdlib" else _files_at(data.path, _ENDINGS[data.source])
    if not found:
        kind = {"stdlib": "*.py", "text": "visible"}.get(data.source, "*." + data.source)
        raise ValueError(f"path={data.path!r} has no documents: there is no {kind} file")
    return sorted(found)


def fingerprint(data: Data) -> list:
    """What identifies the files' present content without reading it; part of the prepared folder's key."""
    if data.source == "stdlib":
        return [platform.python_implementation(), *([f.name, f.size] for f in files(data))]
    return [[file.name, file.size, file.mtime_ns] for file in files(data)]


def _stdlib_files() -> list[File]:
    root, found = sysconfig.get_path("stdlib"), []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _STDLIB_WITHOUT]
        for name in names:
            # _sysconfigdata describes the machine
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                place = os.path.join(folder, name)
                relative = os.path.relpath(place, root).replace(os.sep, "/")
                found.append(File(relative, place, os.path.getsize(place), 0))
    return found


def _files_at(path: str, ending: str | tuple[str, ...]) -> list[File]:
    """Files named by a file's path, a folder (all visible ones with the ending below it) or a glob."""
    if re.search(r"[*?\[]", path) and storage.info(path) is None:
        return _files_by_pattern(path)
    there = storage.info(path)
    if there is None:
        raise ValueError(f"path={path!r} does not exist: give a file, folder, glob or URI")
    if not there.is_folder:
        return [File(there.path, path, there.size, there.mtime_ns)]
    return [
        File(entry.path, storage.join(path, entry.path), entry.size, entry.mtime_ns)
        for entry in storage.entries(path, recursive=True)
        if not entry.is_folder
        and entry.path.endswith(ending)
        and not any(part.startswith(".") for part in entry.path.split("/"))
    ]


def _files_by_pattern(pattern: str) -> list[File]:
    """Names are relative to the last folder before the first wildcard."""
    root = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    wanted = pattern[len(root) + 1 :] if root else pattern
    if not storage.is_uri(pattern):
        root = root or ("/" if pattern.startswith("/") else ".")
        places = glob.glob(wanted, root_dir=root, recursive=True)
        found = [(name.replace(os.sep, "/"), storage.info(os.path.join(root, name))) for name in places]
    else:
        match = re.compile(_regex(wanted)).fullmatch
        found = [(entry.path, entry) for entry in storage.entries(root, recursive=True) if match(entry.path)]
    return [
        File(name, storage.join(root, name), entry.size, entry.mtime_ns) for name, entry in found if not entry.is_folder
    ]


def _regex(pattern: str) -> str:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    cut = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return "".join(parts.get(part, part if part.startswith("[") else re.escape(part)) for part in cut)


def _stdlib(file: File, field: str) -> Iterator[Document]:
    try:
        yield Document(file.name, storage.read(file.place).decode())
    except UnicodeDecodeError:  # a few files exist to be in other encodings
        return


def _text(file: File, field: str) -> Iterator[Document]:
    with _open(file) as lines:
        content = lines.read()
    try:
        yield Document(file.name, content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.place} is not UTF-8 text (byte {error.start}): leave it out, say with a glob like *.txt"
        ) from None


def _jsonl(file: File, field: str) -> Iterator[Document]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file.place}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not a JSON object ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: not a JSON object, but {type(row).__name__}")
            if field not in row:
                raise ValueError(f"{where}: no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}")
            yield Document(f"{file.name}:{number}", _checked(row[field], where, field))


def _parquet(file: File, field: str) -> Iterator[Document]:
    from pyarrow import ArrowInvalid, parquet, types

    system, path = storage.filesystem(file.place)
    with system.open_input_file(path) as opened:
        try:
            table = parquet.ParquetFile(opened)
        except (ArrowInvalid, OSError) as error:
            raise ValueError(f"{file.place} is not a Parquet file ({str(error).splitlines()[0]})") from None
        schema = table.schema_arrow
        if field not in schema.names:
            raise ValueError(f"{file.place}: no field {field!r}; it has {', '.join(map(repr, schema.names))}")
        kind = schema.field(field).type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise ValueError(f"{file.place}: field {field!r} is {kind}, not text")
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[field], use_threads=False):
            for text in batch.column(0).to_pylist():
                number += 1
                yield Document(f"{file.name}:{number}", _checked(text, f"{file.place}: row {number}", field))


def _checked(text, where: str, field: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: field {field!r} has half a surrogate pair, which no UTF-8 text has") from None
    return text


def _open(file: File):
    """A binary file read line by line; .gz and .zst are unpacked by their ending."""
    system, path = storage.filesystem(file.place)
    return io.BufferedReader(system.open_input_stream(path), 1 << 20)
