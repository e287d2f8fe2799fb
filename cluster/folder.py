"""A folder with a manifest: files that are either all there, as they were written, or not there at all.

`manifest.json` holds the size and sha256 of every file, whatever `meta` the writer adds, and its own
digest. It is written last, so a torn write has no manifest and is not a folder. Checkpoints, model folders
and prepared data are such folders, on a local disk or any pyarrow.fs URI. Tensors are safetensors; nothing
is ever pickled.

Writing over an existing folder never breaks the old one: new files first get free names, one replacement of
the manifest switches to them, and only then do they take over their plain names (a second manifest) and the
old bytes go. At each of these moments the manifest in place describes files that are there.
"""

import hashlib
import json
import posixpath
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster import storage

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 22


class Damaged(ValueError):
    """A folder, or one of its files, is missing or is not what was written; the message names it."""


class Unreadable(Damaged):
    """A folder's manifest or file cannot be read here and now: it may well be whole."""


def write(uri: str, files: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> None:
    """Writes a folder in one go; files: name -> bytes, str, or tensors (for a name in .safetensors)."""
    seal(uri, [put(uri, name, content) for name, content in files.items()], meta)


def put(uri: str, name: str, content: Any) -> dict:
    """Writes one file of a folder to come and returns its entry for `seal`.

    Several processes may put files of one folder; one of them gathers the entries and seals.
    content: bytes, str (UTF-8), a local Path (copied), or dict[str, Tensor] (any device and layout).
    """
    dots = any(not part.strip(".") for part in name.split("/"))  # "./a" is "a" again, ".." is outside
    if not re.fullmatch(r"[\w.+=-]+(/[\w.+=-]+)*", name) or name == MANIFEST or dots:
        raise ValueError(
            f"{name!r} cannot be a file of a folder: use letters, digits, ._+=- and / between parts, no part only dots"
        )
    if isinstance(content, Mapping) != name.endswith(".safetensors"):
        raise ValueError(f"{name!r}: a dict of tensors goes into a .safetensors file, and nothing else does")
    file = name if storage.info(storage.join(uri, MANIFEST)) is None else _free_name(name)
    place = storage.join(uri, file)
    target = storage.local_path(place)
    if isinstance(content, Path) or (isinstance(content, Mapping) and target is not None):
        return {"name": name, "file": file} | _put_large(place, target, content)
    if isinstance(content, Mapping):
        from safetensors.torch import save

        content = save(_plain(content))
    if isinstance(content, str):
        content = content.encode()
    storage.write(place, content)
    return {"name": name, "file": file, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def seal(uri: str, entries: Iterable[dict], meta: Mapping[str, Any] | None = None) -> None:
    """Writes the manifest: from now on this is a folder. meta: anything JSON can say."""
    entries = [dict(entry) for entry in entries]
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"a file was put twice into {uri}: {next(n for n in names if names.count(n) > 1)}")
    old = _parse(uri)[0]
    _write_manifest(uri, entries, meta)
    if any(entry["file"] != entry["name"] for entry in entries):
        spare = [entry["file"] for entry in entries if entry["file"] != entry["name"]]
        for entry in entries:
            if entry["file"] != entry["name"]:
                storage.copy(storage.join(uri, entry["file"]), storage.join(uri, entry["name"]))
                entry["file"] = entry["name"]
        _write_manifest(uri, entries, meta)
        for file in spare:
            storage.delete(storage.join(uri, file))
    for entry in (old or {"files": []})["files"]:
        if entry["file"] not in names:
            storage.delete(storage.join(uri, entry["file"]))


def read_manifest(uri: str) -> dict:
    """{"format", "files": [{"name", "file", "size", "sha256"}], "meta"}. Damaged when missing or altered."""
    manifest, trouble = _parse(uri)
    if manifest is None:
        raise trouble
    return manifest


def complete(uri: str) -> bool:
    """Whether there is a manifest and every file has its size. Reads no contents: `verify` does."""
    return _trouble(uri) is None


def verify(uri: str) -> None:
    """Reads every file; Damaged names the first one that is missing or altered."""
    folder = load(uri)
    for name in folder.names:
        folder.check(name)


def load(uri: str) -> "Folder":
    """Opens a folder. Contents are read, and checked against their sha256, when asked for."""
    return Folder(uri)


class Folder:
    """A folder opened for reading: `names`, `meta`, and each file as bytes, text, JSON or tensors."""

    def __init__(self, uri: str):
        manifest = read_manifest(uri)
        self.uri = uri
        self.meta: dict = manifest["meta"]
        self._entries = {entry["name"]: entry for entry in manifest["files"]}

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def place(self, name: str) -> str:
        """Path or URI of a file whose size is as written (contents unchecked); else Damaged names it."""
        entry = self._entry(name)
        trouble = _size_trouble(self.uri, entry)
        if trouble:
            raise trouble
        return storage.join(self.uri, entry["file"])

    def check(self, name: str) -> str:
        """Path or URI of a file, its contents read and checked."""
        place, digest = self.place(name), hashlib.sha256()
        system, path = storage.filesystem(place)
        with system.open_input_stream(path, compression=None) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        self._compare(name, digest.hexdigest())
        return place

    def bytes(self, name: str) -> bytes:
        content = storage.read(self.place(name))
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def text(self, name: str) -> str:
        return self.bytes(name).decode()

    def json(self, name: str) -> Any:
        return json.loads(self.bytes(name))

    def tensors(self, name: str) -> dict:
        """dict[str, Tensor] on the CPU; a local file is mapped, not copied."""
        from safetensors import torch as safetensors

        if storage.local_path(self.uri) is None:
            return safetensors.load(self.bytes(name))
        return safetensors.load_file(storage.local_path(self.check(name)))

    def _entry(self, name: str) -> dict:
        if name not in self._entries:
            raise Damaged(f"{self.uri} has no file {name}; it has {', '.join(self._entries) or 'none'}")
        return self._entries[name]

    def _compare(self, name: str, sha256: str) -> None:
        if sha256 != self._entry(name)["sha256"]:
            raise Damaged(f"{storage.join(self.uri, name)} is damaged (its sha256 differs): use another copy")


def latest(parent: str, prefix: str = "step-") -> str | None:
    """The complete folder under `parent` with the highest number after `prefix`; None when there is none."""
    for _, uri in reversed(_numbered(parent, prefix)):
        if complete(uri):
            return uri
    return None


def prune(parent: str, keep: int, prefix: str = "step-") -> list[str]:
    """Deletes all but the `keep` newest complete folders, and torn ones older than the newest.

    One that cannot be read now stays. Returns what went. ValueError for keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least 1 folder has to stay")
    kept, gone = 0, []
    for _, uri in reversed(_numbered(parent, prefix)):
        trouble = _trouble(uri)
        if kept < keep and trouble is None:
            kept += 1
        elif kept and not isinstance(
            trouble, Unreadable
        ):  # above the newest complete one somebody may still be writing
            storage.delete(storage.join(uri, MANIFEST))  # first, so that half a deletion is no folder
            storage.delete(uri)
            gone.append(uri)
    return gone


def _numbered(parent: str, prefix: str) -> list[tuple[int, str]]:
    found = []
    for entry in storage.entries(parent):
        number = entry.path.removeprefix(prefix)
        if entry.is_folder and entry.path.startswith(prefix) and number.isdecimal():
            found.append((int(number), storage.join(parent, entry.path)))
    return sorted(found)


def _trouble(uri: str) -> Damaged | None:
    """Why a folder is not complete."""
    manifest, trouble = _parse(uri)
    if manifest is None:
        return trouble
    return next(filter(None, (_size_trouble(uri, entry) for entry in manifest["files"])), None)


def _parse(uri: str) -> tuple[dict | None, Damaged | None]:
    """The manifest, or why there is none: never an error, so that one bad folder does not hide its neighbours."""
    place = storage.join(uri, MANIFEST)
    try:
        content = storage.read(place)
    except (FileNotFoundError, NotADirectoryError):
        return None, Damaged(f"{uri} is not a complete folder: it has no {MANIFEST}; its writer did not finish")
    except OSError as error:
        return None, Unreadable(f"{place} cannot be read: {error}")
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            return None, Damaged(f"{place} has format {manifest['format']}; this version reads format {FORMAT}")
        if manifest.pop("digest") == _digest(manifest):
            return manifest, None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None, Damaged(f"{place} is damaged (its digest differs): use another copy")


def _write_manifest(uri: str, entries: list[dict], meta: Mapping[str, Any] | None) -> None:
    manifest = json.loads(json.dumps({"format": FORMAT, "files": entries, "meta": dict(meta or {})}))
    text = json.dumps(manifest | {"digest": _digest(manifest)}, indent=1)
    storage.write(storage.join(uri, MANIFEST), text.encode())


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _size_trouble(uri: str, entry: dict) -> Damaged | None:
    place = storage.join(uri, entry["file"])
    try:
        found = storage.info(place)
    except OSError as error:
        return Unreadable(f"{place} cannot be read: {error}")
    if found is None or found.is_folder:
        return Damaged(f"{place} is missing: use another copy")
    if found.size != entry["size"]:
        return Damaged(f"{place} is damaged ({found.size} bytes instead of {entry['size']}): use another copy")
    return None


def _free_name(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, f".{uuid.uuid4().hex[:12]}-{base}")


def _put_large(place: str, target: Path | None, content: Any) -> dict:
    """A local Path, or tensors onto a local disk: not held in memory as one string."""
    if target is None:
        system, path = storage.filesystem(place)
        storage.make_parents(system, path)
        with system.open_output_stream(path, compression=None) as out:
            return _pump(content, out.write)
    with storage.temporary(target) as part:
        if isinstance(content, Path):
            with part.open("wb") as out:
                result = _pump(content, out.write)
        else:
            from safetensors.torch import save_file

            save_file(_plain(content), part)
            result = _pump(part, lambda chunk: None)
        storage.publish(part, target)
    return result


def _pump(source: Path, sink: Callable[[bytes], Any]) -> dict:
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sink(chunk)
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def _plain(tensors: Mapping[str, Any]) -> dict:
    """Tensors as safetensors takes them: on the CPU, contiguous, none shared (tied weights go in twice)."""
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return plain
