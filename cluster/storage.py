"""Places where bytes live: a local path, or any URI that pyarrow.fs opens.

A string without "://" is a local path. Everything that must not be seen half-written goes through `write`:
on a local disk a temporary file is synced and renamed over the name; an object store shows an object only
when closed.
"""

import os
import posixpath
import uuid
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """One file or folder: `path` relative to the listed place, with "/" between parts."""

    path: str
    size: int
    mtime_ns: int
    is_folder: bool


def home() -> str:
    """Where runs/ and data/ live: EDIFICE_HOME, by default ~/.edifice."""
    place = os.environ.get("EDIFICE_HOME") or "~/.edifice"
    return place if is_uri(place) else str(Path(place).expanduser().absolute())


def is_uri(place: str) -> bool:
    return "://" in str(place)


def join(place: str, *parts: str) -> str:
    return posixpath.join(str(place).rstrip("/") or "/", *parts)


def split(place: str) -> tuple[str, str]:
    """(parent, name) of a path or URI, a trailing slash ignored; a local path is made absolute first."""
    if not is_uri(place):
        place = str(Path(place).expanduser().absolute())
    parent, _, name = str(place).rstrip("/").rpartition("/")
    return parent or "/", name


def filesystem(place: str):
    """(pyarrow FileSystem, path in it). ValueError for a URI no filesystem understands."""
    from pyarrow import fs

    if not is_uri(place):
        return fs.LocalFileSystem(), str(Path(place).expanduser().absolute())
    return _from_uri(str(place))


@lru_cache(maxsize=1024)  # an object store's client is slow to make
def _from_uri(place: str):
    from pyarrow import ArrowInvalid, fs

    try:
        return fs.FileSystem.from_uri(place)
    except (ArrowInvalid, ImportError) as error:
        raise ValueError(
            f"cannot open {place!r}: {error}; use a path or a file://, s3://, gs:// or fsspec+NAME:// URI"
        ) from None


def local_path(place: str) -> Path | None:
    """The path on this machine's disk, or None when the place is elsewhere."""
    from pyarrow import fs

    system, path = filesystem(place)
    return Path(path) if isinstance(system, fs.LocalFileSystem) else None


def info(place: str) -> Entry | None:
    """What is there, under its own name; None when nothing is."""
    from pyarrow import fs

    system, path = filesystem(place)
    found = system.get_file_info(path)
    if found.type == fs.FileType.NotFound:
        return None
    is_folder = found.type == fs.FileType.Directory
    return Entry(found.base_name, found.size or 0, found.mtime_ns or 0, is_folder)


def entries(place: str, recursive: bool = False) -> list[Entry]:
    """Files and folders below a folder, sorted by path; empty when the folder does not exist."""
    from pyarrow import fs

    system, path = filesystem(place)
    root = path.rstrip("/")
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
    rows = [
        Entry(
            posixpath.relpath(each.path, root),
            each.size or 0,
            each.mtime_ns or 0,
            each.type == fs.FileType.Directory,
        )
        for each in found
    ]
    return sorted(rows)


def read(place: str) -> bytes:
    """All bytes of a file. FileNotFoundError names the place."""
    system, path = filesystem(place)
    try:
        with system.open_input_file(path) as file:
            return file.readall()
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {place}") from None


def write(place: str, content: bytes) -> None:
    """Creates or replaces a file (and its parent folders); nobody ever sees a part of it."""
    target = local_path(place)
    if target is None:
        system, path = filesystem(place)
        make_parents(system, path)
        with system.open_output_stream(path, compression=None) as file:
            file.write(content)
        return
    with temporary(target) as part:
        part.write_bytes(content)
        publish(part, target)


def copy(source: str, target: str) -> None:
    """Copies a file inside one filesystem, the target replaced at once."""
    here, there = local_path(source), local_path(target)
    if here is None or there is None:
        system, path = filesystem(source)
        system.copy_file(path, filesystem(target)[1])
        return
    with temporary(there) as part:
        try:
            os.link(here, part)  # no bytes move
        except OSError:  # a disk without hard links
            part.write_bytes(here.read_bytes())
        publish(part, there)


def delete(place: str) -> None:
    """Removes a file or a whole folder; nothing happens when there is none."""
    from pyarrow import fs

    system, path = filesystem(place)
    with suppress(FileNotFoundError):
        if system.get_file_info(path).type == fs.FileType.Directory:
            system.delete_dir(path)
        elif system.get_file_info(path).type != fs.FileType.NotFound:
            system.delete_file(path)


def make_parents(system, path: str) -> None:
    parent = posixpath.dirname(path.rstrip("/"))
    if parent:
        system.create_dir(parent, recursive=True)


def publish(temporary: Path, target: Path) -> None:
    """Syncs a finished temporary file and renames it over its name: a power cut leaves the old or the new."""
    _sync(temporary)
    os.replace(temporary, target)
    if os.name == "posix":
        _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class temporary:
    """A free name beside the target, gone afterwards whatever happens (short of a kill)."""

    def __init__(self, target: Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path = target.with_name(f".{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_) -> None:
        self.path.unlink(missing_ok=True)
