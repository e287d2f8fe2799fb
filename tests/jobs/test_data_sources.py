"""jobs/data/documents.py: sources, their order, and one clear line for each mistake."""

import gzip
import json
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from jobs.data import Data
from jobs.data.documents import documents, files, fingerprint


def names_and_texts(**fields):
    return [(name, text) for name, text in documents(Data(**fields))]


def test_stdlib_is_python_source_in_a_fixed_order():
    found = [d for d in documents(Data(limit_bytes=300_000))]
    names = [d.name for d in found]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert all(name.endswith(".py") and not name.startswith("/") for name in names)
    assert sum(len(d.text.encode()) for d in found[:-1]) < 300_000 <= sum(len(d.text.encode()) for d in found)
    everything = {file.name for file in files(Data())}
    assert {"abc.py", "asyncio/base_events.py", "json/decoder.py"} <= everything
    assert not any(part in name.split("/") for name in everything for part in ("site-packages", "test", "tests"))


def test_text_file_folder_and_glob(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes(b"zwei\r\n\n")
    (tmp_path / "one.md").write_text("eins \u00e9\u4e2d")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "three.txt.gz").write_bytes(gzip.compress(b"drei"))
    both = [("b/two.txt", "zwei\r\n\n"), ("one.md", "eins \u00e9\u4e2d"), ("three.txt.gz", "drei")]
    assert names_and_texts(source="text", path=str(tmp_path)) == both
    assert names_and_texts(source="text", path=tmp_path.as_uri()) == both
    assert names_and_texts(source="text", path=str(tmp_path / "one.md")) == both[1:2]
    assert names_and_texts(source="text", path=f"{tmp_path}/**/*.txt") == both[:1]
    assert names_and_texts(source="text", path=f"{tmp_path.as_uri()}/**/*.txt") == both[:1]
    assert names_and_texts(source="text", path=f"{tmp_path}/*.m[de]") == both[1:2]


def test_relative_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    for path in ("a.txt", "*.txt", "."):
        assert names_and_texts(source="text", path=path) == [("a.txt", "x")]


def test_text_behind_a_uri():
    root = f"fsspec+memory://{uuid.uuid4().hex}"
    storage.write(f"{root}/a/x.txt", b"ex")
    storage.write(f"{root}/a/deep/y.txt", b"why")
    assert names_and_texts(source="text", path=f"{root}/a") == [("deep/y.txt", "why"), ("x.txt", "ex")]
    assert names_and_texts(source="text", path=f"{root}/a/*.txt") == [("x.txt", "ex")]
    assert names_and_texts(source="text", path=f"{root}/a/x.txt") == [("x.txt", "ex")]


def test_jsonl_field_and_gzip(tmp_path):
    lines = '{"body": "one\\n", "text": "no"}\n\n{"body": "two"}'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = names_and_texts(source="jsonl", path=str(tmp_path), field="body")
    expected = [
        ("a.jsonl:1", "one\n"),
        ("a.jsonl:3", "two"),
        ("b.jsonl.gz:1", "one\n"),
        ("b.jsonl.gz:3", "two"),
    ]
    assert found == expected


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "x"', r"bad\.jsonl:2: not a JSON object \("),
        ("[1]", r"bad\.jsonl:2: not a JSON object, but list"),
        ('{"txt": "x"}', r"bad\.jsonl:2: no field 'text'; it has 'txt'"),
        ('{"text": 3}', r"bad\.jsonl:2: field 'text' is int, not text"),
        ('{"text": "\\ud800"}', r"bad\.jsonl:2: field 'text' has half a surrogate pair"),
        (b'{"text": "\xff"}', r"bad\.jsonl:2: not a JSON object \("),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        names_and_texts(source="jsonl", path=str(tmp_path / "bad.jsonl"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_column(tmp_path, kind):
    texts = [f"text {i}" for i in range(700)]
    pq.write_table(pa.table({"id": list(range(700)), "content": pa.array(texts, kind)}), tmp_path / "a.parquet")
    found = names_and_texts(source="parquet", path=str(tmp_path), field="content")
    assert [text for _, text in found] == texts and found[4][0] == "a.parquet:5"
    with pytest.raises(ValueError, match=r"a\.parquet: no field 'text'; it has 'id', 'content'"):
        names_and_texts(source="parquet", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"a\.parquet: field 'id' is int64, not text"):
        names_and_texts(source="parquet", path=str(tmp_path), field="id")


def test_parquet_mistakes(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: row 2: field 'text' is NoneType, not text"):
        names_and_texts(source="parquet", path=str(tmp_path))
    (tmp_path / "b.parquet").write_text("not parquet at all")
    with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file"):
        names_and_texts(source="parquet", path=str(tmp_path / "b.parquet"))


def test_places_without_documents(tmp_path):
    with pytest.raises(ValueError, match="path='.*nowhere' does not exist"):
        names_and_texts(source="text", path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"has no documents: there is no \*\.jsonl file"):
        names_and_texts(source="jsonl", path=str(tmp_path))
    with pytest.raises(ValueError, match="has no documents"):
        names_and_texts(source="text", path=f"{tmp_path}/*.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="every text document in it is empty"):
        names_and_texts(source="text", path=str(tmp_path))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"picture\.png is not UTF-8 text \(byte 0\)"):
        names_and_texts(source="text", path=str(tmp_path))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"source": "csv"}, "source='csv': choose one of stdlib, text, jsonl, parquet"),
        ({"path": "x"}, "source 'stdlib' has no path"),
        ({"source": "text"}, "path is empty"),
        ({"val_fraction": 0.0}, "val_fraction=0.0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"limit_bytes": -1}, "limit_bytes=-1"),
        ({"tokenizer_bytes": 0}, "tokenizer_bytes=0"),
    ],
)
def test_impossible_fields_are_one_line(fields, message):
    with pytest.raises(ValueError, match=message):
        Data(**fields).check()


def test_fingerprint_follows_the_files(tmp_path):
    data = Data(source="jsonl", path=str(tmp_path))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}))
    before = fingerprint(data)
    assert before == fingerprint(data)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "longer"}))
    assert before != fingerprint(data)
