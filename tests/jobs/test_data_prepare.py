"""jobs/data/shards.py: split, reuse, every field live, preparations that are killed or meet each other."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster import folder
from jobs.data import Data, prepare, shards, tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDIFICE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def corpus(tmp_path):
    """40 small texts as JSONL; returns the Data of it."""
    texts = [f"document {i}: " + "the cat sat on the mat. " * (i % 7 + 1) + "<|eos|>" for i in range(40)]
    rows = "".join(json.dumps({"text": text, "other": f"{i * i} or so, " * 3}) + "\n" for i, text in enumerate(texts))
    (tmp_path / "corpus.jsonl").write_text(rows)
    return Data(source="jsonl", path=str(tmp_path / "corpus.jsonl"), vocab=300, val_fraction=0.2)


def rows_of(prepared, split):
    opened = folder.load(prepared.folder)
    names = [name for name in opened.names if name.startswith(split + "/")]
    return [row for name in names for row in pq.read_table(opened.check(name), partitioning=None).to_pylist()]


def test_every_document_is_in_one_split_and_reads_back(corpus, monkeypatch):
    monkeypatch.setattr(shards, "GROUP_TOKENS", 200)
    monkeypatch.setattr(shards, "GROUPS_PER_FILE", 2)
    prepared = prepare(corpus, quiet=True)
    loaded = tokenizer.load(prepared.tokenizer)
    assert prepared.vocab == tokenizer.size(loaded) == 300
    train, val = rows_of(prepared, "train"), rows_of(prepared, "val")
    names = [row["name"] for row in train + val]
    assert sorted(names) == sorted(f"corpus.jsonl:{i + 1}" for i in range(40))
    assert len(train) > len(val) > 1
    lines = Path(corpus.path).read_text().splitlines()
    bytes_C = tokenizer.token_bytes(loaded)
    for row in train + val:
        text = json.loads(lines[int(row["name"].rpartition(":")[2]) - 1])["text"]
        ids = row["ids"]
        assert (ids[0], ids[-1], row["length"]) == (0, 1, len(ids)) and min(ids[1:-1]) >= 6
        assert loaded.decode(ids[1:-1], skip_special_tokens=False) == text
        assert int(bytes_C[ids].sum()) == row["bytes"] == len(text.encode())
    meta = folder.load(prepared.folder).meta["splits"]
    for split, rows in (("train", train), ("val", val)):
        assert meta[split]["documents"] == len(rows)
        assert meta[split]["tokens"] == sum(row["length"] for row in rows)
        assert meta[split]["bytes"] == sum(row["bytes"] for row in rows)
        assert all(len(file["tokens"]) <= 2 and min(file["tokens"]) > 0 for file in meta[split]["files"])
    assert len(meta["train"]["files"]) > 1


def test_a_second_call_reuses_and_a_changed_source_does_not(corpus, monkeypatch):
    first = prepare(corpus, quiet=True)
    monkeypatch.setattr(shards, "_make", None)
    assert prepare(corpus, quiet=True) == first
    monkeypatch.undo()
    path = Path(corpus.path)
    path.write_text(path.read_text() + json.dumps({"text": "one more", "other": "!"}) + "\n")
    assert shards.key(corpus) != Path(first.folder).name


def test_the_split_follows_names_alone(corpus):
    val = {row["name"] for row in rows_of(prepare(corpus, quiet=True), "val")}
    path = Path(corpus.path)
    more = "".join(json.dumps({"text": f"new {i}", "other": "!"}) + "\n" for i in range(20))
    path.write_text(path.read_text() + more)
    after = {row["name"] for row in rows_of(prepare(corpus, quiet=True), "val")}
    assert val <= after


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_split_is_ever_empty(corpus, fraction):
    prepared = prepare(dataclasses.replace(corpus, val_fraction=fraction), quiet=True)
    lengths = len(rows_of(prepared, "train")), len(rows_of(prepared, "val"))
    assert lengths in ((39, 1), (1, 39))


def test_a_single_file_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "input.txt").write_text(text)
    prepared = prepare(Data(source="text", path=str(tmp_path / "input.txt"), vocab=262, val_fraction=0.1), quiet=True)
    (train,), (val,) = rows_of(prepared, "train"), rows_of(prepared, "val")
    decode = tokenizer.load(prepared.tokenizer).decode
    train_text, val_text = decode(train["ids"][1:-1]), decode(val["ids"][1:-1])
    assert train_text + val_text == text and train_text.endswith("\n")
    assert 0.08 < len(val_text) / len(text) < 0.13
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ValueError, match="nothing to hold out"):
        prepare(Data(source="text", path=str(tmp_path / "one.txt"), vocab=262), quiet=True)


def test_long_texts_are_encoded_in_pieces_and_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BATCH_BYTES", 50)
    texts = {"a.txt": "word " * 100, "b.txt": "line of text\n" * 30, "c.txt": "\u4e2d" * 120}
    for name, text in texts.items():
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    prepared = prepare(Data(source="text", path=str(tmp_path / "texts"), vocab=280), quiet=True)
    decode = tokenizer.load(prepared.tokenizer).decode
    rows = rows_of(prepared, "train") + rows_of(prepared, "val")
    assert {row["name"]: decode(row["ids"][1:-1]) for row in rows} == texts


@pytest.mark.parametrize(
    "change",
    [
        {"field": "other"},
        {"limit_bytes": 300},
        {"vocab": 280},
        {"tokenizer_bytes": 60},
        {"val_fraction": 0.6},
        {"bos": "<|user|>"},
        {"eos": "<|end|>"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_changes_the_folder_and_its_content(corpus, change):
    before, after = prepare(corpus, quiet=True), prepare(dataclasses.replace(corpus, **change), quiet=True)
    assert before.folder != after.folder
    contents = [[rows_of(prepared, split) for split in ("train", "val")] for prepared in (before, after)]
    assert contents[0] != contents[1]


def test_an_existing_tokenizer_is_used(corpus, tmp_path):
    own = tokenizer.train(["zebra zebra zebra"], 265)
    own.save(str(tmp_path / "own.json"))
    data = dataclasses.replace(corpus, tokenizer=str(tmp_path / "own.json"))
    prepared = prepare(data, quiet=True)
    assert prepared.vocab == 265 and tokenizer.load(prepared.tokenizer).to_str() == own.to_str()
    # nothing is trained, so vocab does not matter
    assert shards.key(dataclasses.replace(data, vocab=999)) == Path(prepared.folder).name
    with pytest.raises(ValueError, match="no special token '<s>'"):
        prepare(dataclasses.replace(data, bos="<s>"), quiet=True)


def test_a_bad_line_is_named_through_tokenizer_training(corpus):
    path = Path(corpus.path)
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:41: not a JSON object"):
        prepare(corpus, quiet=True)


RUN = """
import sys, time
from jobs.data import Data, prepare, shards
shards.GROUP_TOKENS, shards.GROUPS_PER_FILE = 20_000, 1
if sys.argv[1:] == ["slow"]:
    put = shards.folder.put
    def slow(*arguments):
        entry = put(*arguments)
        print(arguments[1], flush=True)
        time.sleep(0.2)
        return entry
    shards.folder.put = slow
print(prepare(Data(limit_bytes=400_000, vocab=400), quiet=True).folder, flush=True)
"""


def start(*arguments):
    return subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True)


def test_a_killed_preparation_is_never_taken_for_a_finished_one(home):
    for files in (1, 3):
        process = start("slow")
        for _ in range(files):
            assert "part-" in process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        (left,) = (home / "data").iterdir()
        assert not folder.complete(str(left))
    process = start()
    place = process.communicate()[0].strip()
    assert process.returncode == 0 and place == str(left)
    folder.verify(place)
    again = time.monotonic()
    assert start().communicate()[0].strip() == place
    assert time.monotonic() - again < 20


def test_two_preparations_at_once_are_both_right(home):
    processes = [start("slow"), start("slow"), start()]
    places = {process.communicate()[0].strip().splitlines()[-1] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (place,) = places
    folder.verify(place)
    assert not list(Path(place).rglob(".*"))  # no litter


def test_the_command_prints_statistics_and_errors_in_one_line(corpus):
    options = ["--source", "jsonl", "--path", corpus.path, "--vocab", "300"]
    command = [sys.executable, "-m", "jobs.data", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "documents" in done.stdout and "bytes per token" in done.stdout
    done = subprocess.run([*command, "--field", "nope"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "no field 'nope'" in done.stderr
    done = subprocess.run([*command, "--nope", "1"], capture_output=True, text=True)
    assert done.returncode != 0 and "nope" in done.stderr + done.stdout
    assert os.path.isdir(os.environ["EDIFICE_HOME"])
