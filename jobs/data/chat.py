"""Conversations to learn from: JSONL lines to tokens, of which only what the assistant says is learnt.

    {"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}, {"role": "assistant", ...}, ...]}
    {"prompt": "...", "completion": "..."}        one question and its answer

A conversation is <|bos|>, then <|role|> content <|end|> for each message, then <|eos|>: the form that serve's chat
endpoint prompts with. Learnt are an assistant's content, the <|end|> behind it, and <|eos|> when it has the last word.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cluster import folder, storage
from jobs.data import tokenizer as tokenizers
from jobs.data.config import Data
from jobs.data.documents import File, files, fingerprint
from jobs.data.progress import Progress
from jobs.data.shards import Prepared

VERSION = 2  # of what is written: a change makes prepared folders anew
ROLES = ("system", "user", "assistant")
_BATCH = 256  # conversations encoded at once


@dataclass(frozen=True)
class Chats:
    """Conversations, for a model that has a tokenizer."""

    source: Literal["chat"] = "chat"
    """chat: JSONL, one conversation a line."""
    path: str = ""
    """File, folder, glob (with * ? **) or URI of the JSONL."""
    tokenizer: str = ""
    """The tokenizer.json (path or URI) of the model."""
    limit_bytes: int = 0
    """Stop after the conversation that reaches this many bytes of text; 0 takes everything."""
    bos: str = "<|bos|>"
    """The special token that opens every conversation."""
    eos: str = "<|eos|>"
    """The special token that closes every conversation."""
    val_fraction: float = 0.05
    """Share of the conversations that is held out, chosen by a hash of their places."""

    def check(self) -> None:
        """ValueError, one line, for the first field that can't be."""
        for name, what in (("path", "JSONL of conversations"), ("tokenizer", "tokenizer.json of the model")):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give the {what}")
        self.files().check()

    def files(self) -> Data:
        """The source as `jobs.data.documents` finds its files."""
        return Data("jsonl", self.path, limit_bytes=self.limit_bytes, val_fraction=self.val_fraction)


class Form:
    """The default chat form with the ids of one tokenizer. ValueError when that lacks a special token of the form."""

    def __init__(self, tokenizer: Any, bos: str = "<|bos|>", eos: str = "<|eos|>") -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos, self.end = (tokenizers.special(tokenizer, token) for token in (bos, eos, "<|end|>"))
        self.roles = {role: tokenizers.special(tokenizer, f"<|{role}|>") for role in ROLES}

    def encode(self, chats: list[list[dict[str, str]]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int64, learn bool) of each conversation; learn[n]: token n is a target. Messages as from `messages`."""
        texts = tokenizers.encode_batch(self.tokenizer, [message["content"] for chat in chats for message in chat])
        contents = iter(texts)
        return [self._join(chat, [next(contents) for _ in chat]) for chat in chats]

    def _join(self, chat: list[dict[str, str]], contents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        ids, learn = [[self.bos]], [[False]]
        for message, content in zip(chat, contents, strict=True):
            said = message["role"] == "assistant"
            ids += [[self.roles[message["role"]]], content, [self.end]]
            learn += [[False], [said] * (len(content) + 1)]
        ids.append([self.eos])
        learn.append([chat[-1]["role"] == "assistant"])
        return np.concatenate(ids).astype(np.int64), np.concatenate(learn).astype(bool)


def messages(row: Any, where: str) -> list[dict[str, str]]:
    """The messages of a JSONL line; ValueError, beginning with `where`, says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object, but {type(row).__name__}")
    if "messages" in row:
        chat = row["messages"]
    elif "prompt" in row and "completion" in row:
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    else:
        known = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"{where}: needs 'messages', or 'prompt' and 'completion'; its fields: {known}")
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        raise ValueError(f"{where}: messages has to be a list of objects with role and content")
    for number, message in enumerate(chat):
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}: messages[{number}] has role {message.get('role')!r}; use {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: messages[{number}] has no text in its content")
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: messages[{number}] has half a surrogate pair, which no text has") from None
    if not any(message["role"] == "assistant" for message in chat):
        raise ValueError(f"{where}: no message of the assistant, so there is nothing to learn")
    return chat


def prepare(data: Chats, quiet: bool = False) -> Prepared:
    """Finds or makes the prepared folder of conversations in EDIFICE_HOME/data. ValueError for bad input."""
    data.check()
    place = storage.join(storage.home(), "data", _key(data))
    if not folder.complete(place):
        _make(data, place, quiet)
    found = folder.load(place)
    return Prepared(place, storage.join(place, "tokenizer.json"), found.meta["vocab"])


def _key(data: Chats) -> str:
    own = hashlib.sha256(storage.read(data.tokenizer)).hexdigest()
    spec = [VERSION, own, data.bos, data.eos, data.val_fraction, data.limit_bytes, fingerprint(data.files())]
    return f"chat-{hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16]}"


def _make(data: Chats, place: str, quiet: bool) -> None:
    text = storage.read(data.tokenizer).decode()
    tokenizer = tokenizers.parse(text, data.tokenizer)
    form, names, encoded, batch = Form(tokenizer, data.bos, data.eos), [], [], []
    with Progress("encode conversations", quiet=quiet) as progress:
        for name, chat in _chats(data):
            names.append(name)
            batch.append(chat)
            progress.add(sum(len(message["content"].encode()) for message in chat))
            if len(batch) == _BATCH:
                encoded += form.encode(batch)
                batch = []
        encoded += form.encode(batch) if batch else []
    if len(names) < 2:
        raise ValueError(f"path={data.path!r} has {len(names)} conversations: at least 2 are needed, 1 is held out")
    held_out, content = _held_out(names, data.val_fraction), {}
    for split in ("train", "val"):
        chosen = [encoded[n] for n in range(len(names)) if (n in held_out) == (split == "val")]
        content[f"{split}.safetensors"] = _tensors(chosen)
    meta = {"vocab": tokenizers.size(tokenizer), "conversations": len(names), "held_out": len(held_out)}
    folder.write(place, {"tokenizer.json": text, **content}, meta)


def _chats(data: Chats) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(name, messages) of each line of the source, up to `limit_bytes` of text."""
    taken = 0
    for file in files(data.files()):
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            where = f"{file.place}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not a JSON object ({error})") from None
            chat = messages(row, where)
            yield f"{file.name}:{number}", chat
            taken += sum(len(message["content"].encode()) for message in chat)
            if data.limit_bytes and taken >= data.limit_bytes:
                return


def _lines(file: File) -> Iterator[bytes]:
    system, path = storage.filesystem(file.place)
    with system.open_input_stream(path) as stream:  # .gz and .zst are unpacked by their ending
        yield from io.BufferedReader(stream, 1 << 20)


def _held_out(names: list[str], fraction: float) -> set[int]:
    """Numbers of the held-out conversations: those whose hashed names are lowest, at least one, never all."""
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48 for name in names]
    count = min(max(sum(value < fraction for value in hashes), 1), len(names) - 1)
    return set(sorted(range(len(names)), key=lambda n: (hashes[n], names[n]))[:count])


def _tensors(encoded: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """ids_N int32 and learn_N bool, end to end; starts_K int64: where each conversation begins, and the end."""
    import torch

    ids_N = np.concatenate([ids for ids, _ in encoded]).astype(np.int32)
    learn_N = np.concatenate([learn for _, learn in encoded])
    starts_K = np.cumsum([0] + [len(ids) for ids, _ in encoded])
    return {
        "ids_N": torch.from_numpy(ids_N),
        "learn_N": torch.from_numpy(learn_N),
        "starts_K": torch.from_numpy(starts_K.astype(np.int64)),
    }
