"""What a model's folder holds: one of ours, whose manifest says so, or one as Hugging Face has them."""

import json
from pathlib import Path
from typing import Any

from cluster import folder, storage
from models import hub


class Plain:
    """A Hugging Face folder: it has no manifest, so its files are taken as they are."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def __contains__(self, name: str) -> bool:
        return (self._path / name).is_file()

    def text(self, name: str) -> str:
        return (self._path / name).read_text()

    def json(self, name: str) -> Any:
        return json.loads(self.text(name))


def is_plain(path: str) -> bool:
    """Whether `path` is a Hugging Face folder."""
    if storage.is_uri(path) or "config.json" not in (files := Plain(path)) or folder.complete(path):
        return False
    try:
        return "architectures" in files.json("config.json")
    except ValueError:
        return False


def stored(path: str) -> "folder.Folder | Plain":
    """The files at `path`, a model folder or a run, whose newest checkpoint is taken. OSError or ValueError if not."""
    return Plain(path) if is_plain(path) else folder.load(hub.locate(path))
