"""jobs/data/index.py and loader.py: each target exactly once for any world; a cursor is one number."""

import random
import threading
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster import folder
from jobs.data import Data, index, prepare, shards
from jobs.data.index import Index, permutation
from jobs.data.loader import Loader


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Many tiny groups, files and buffers: documents of 1 to 120 words in 40 groups."""
    root = tmp_path_factory.mktemp("index")
    patch = pytest.MonkeyPatch()
    patch.setenv("EDIFICE_HOME", str(root / "home"))
    patch.setattr(shards, "GROUP_TOKENS", 150)
    patch.setattr(shards, "GROUPS_PER_FILE", 3)
    patch.setattr(index, "GROUPS_PER_BUFFER", 4)
    draw = random.Random(0)
    (root / "text").mkdir()
    for i in range(150):
        words = " ".join(str(draw.randrange(10_000)) for _ in range(draw.choice([1, 3, 20, 120])))
        (root / "text" / f"{i:03d}.txt").write_text(f"{i:03d} {words}")
    yield prepare(Data(source="text", path=str(root / "text"), vocab=300, val_fraction=0.2), quiet=True).folder
    patch.undo()


def stored(place, split):
    opened = folder.load(place)
    names = [name for name in opened.names if name.startswith(split + "/")]
    return [ids for name in names for ids in pq.read_table(opened.check(name), partitioning=None)["ids"].to_pylist()]


def whole_epoch(found, epoch=0):
    return found.rows(epoch * found.samples_per_epoch, found.samples_per_epoch)


def pairs(batch):
    """(input, target) of every position that has a target."""
    has = batch["targets_BT"] >= 0
    return Counter(zip(batch["ids_BT"][has].tolist(), batch["targets_BT"][has].tolist(), strict=True))


def pieces(batch):
    """Every segment of every row, as the tuple of its tokens and its last target."""
    found = []
    for ids_T, targets_T, segments_T in zip(*(t.numpy() for t in batch.values()), strict=True):
        for number in range(segments_T.max() + 1):
            at = np.flatnonzero(segments_T == number)
            assert (np.diff(at) == 1).all()
            assert (targets_T[at[:-1]] == ids_T[at[1:]]).all()  # inside a segment the target is the next token
            found.append((*ids_T[at].tolist(), int(targets_T[at[-1]])))
    return found


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000, 100_000])
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_target_exactly_once_in_each_epoch(place, split, length):
    documents = stored(place, split)
    expected = Counter(pair for ids in documents for pair in zip(ids, ids[1:], strict=False))
    found = Index(place, split, length, seed=3)
    assert found.targets_per_epoch == expected.total()
    for epoch in (0, 1, 5):
        batch = whole_epoch(found, epoch)
        assert batch["ids_BT"].shape == (found.samples_per_epoch, length)
        assert pairs(batch) == expected
        padding = batch["segments_BT"] < 0
        assert (batch["targets_BT"][padding] == -100).all()
        assert padding.sum() < length and padding.any(1).sum() <= 1


def test_pieces_are_the_documents_text(place):
    """Every segment is a stretch of one document, and together they have all its tokens."""
    documents = stored(place, "train")
    text = "|".join(" " + " ".join(map(str, ids)) + " " for ids in documents)
    got = pieces(whole_epoch(Index(place, "train", 32, seed=1)))
    for piece in got:
        stretch = piece[:-1] if piece[-1] == -100 else piece
        assert " " + " ".join(map(str, stretch)) + " " in text
    inputs = Counter(token for piece in got for token in piece[:-1])
    assert (Counter(token for ids in documents for token in ids) - inputs).total() <= 1  # the last: a target only
    assert inputs[0] == len(documents)


def test_segments_are_documents(place):
    batch = whole_epoch(Index(place, "train", 64))
    ids, segments, targets = batch["ids_BT"], batch["segments_BT"], batch["targets_BT"]
    assert (segments[:, 0] == 0).all() and ids.dtype == segments.dtype == targets.dtype == torch.int64
    steps = segments[:, 1:] - segments[:, :-1]
    real = segments[:, 1:] >= 0
    assert ((steps == 1) == (ids[:, 1:] == 0))[real].all()  # a new number exactly at <|bos|>
    assert ((steps == 0) | (steps == 1))[real].all()
    ends = ids == 1
    assert (targets[ends] == -100).all() and (targets[~ends & (segments >= 0)] >= 0).all()


def test_samples_do_not_depend_on_how_they_are_asked_for(place):
    whole = whole_epoch(Index(place, "train", 16, seed=9))
    count = len(whole["ids_BT"])
    for chunk in (1, 5, count // 2):
        other = Index(place, "train", 16, seed=9)
        order = list(range(0, count, chunk))
        random.Random(chunk).shuffle(order)
        for start in order:
            got = other.rows(start, min(chunk, count - start))
            assert all(torch.equal(got[name], whole[name][start : start + chunk]) for name in whole)


def test_rows_cross_epochs(place):
    found = Index(place, "val", 16)
    per = found.samples_per_epoch
    across = found.rows(per - 2, 5)
    assert torch.equal(across["ids_BT"][:2], found.rows(per - 2, 2)["ids_BT"])
    assert torch.equal(across["ids_BT"][2:], found.rows(per, 3)["ids_BT"])


def test_epochs_and_seeds_differ_and_repeat(place):
    def ids(seed, epoch):
        return whole_epoch(Index(place, "train", 16, seed=seed), epoch)["ids_BT"]

    variants = [ids(0, 0), ids(0, 1), ids(1, 0), ids(-1, 0), ids(1, 1)]
    for i, a in enumerate(variants):
        for b in variants[:i]:
            assert (a == b).float().mean() < 0.5
    assert torch.equal(ids(1, 1), variants[-1])


def test_order_is_fixed_for_ever():
    """Changing these numbers breaks the resume of every run there is."""
    assert permutation(10, 1, 2, 3, 4).tolist() == [9, 4, 5, 0, 8, 3, 6, 7, 2, 1]
    assert sorted(permutation(1000, 7)) == list(range(1000))
    first = [int(permutation(8, seed)[0]) for seed in range(4000)]
    assert all(400 < n < 600 for n in Counter(first).values())


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """One long document."""
    root = tmp_path_factory.mktemp("book")
    (root / "one.txt").write_text(" ".join(map(str, range(20_000))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDIFICE_HOME", str(root / "home"))
        return prepare(Data(source="text", path=str(root / "one.txt"), vocab=262), quiet=True).folder


def test_neighbouring_samples_are_not_neighbours_in_the_text(book):
    batch = whole_epoch(Index(book, "train", 32))
    follows = batch["targets_BT"][:-1, -1] == batch["ids_BT"][1:, 0]
    assert follows.float().mean() < 0.3  # in text order it would be all of them


def test_each_row_group_is_read_once_an_epoch(place, monkeypatch):
    reads = Counter()
    original = Index._read_group

    def counted(self, group):
        reads[group.file, group.number] += 1
        return original(self, group)

    monkeypatch.setattr(Index, "_read_group", counted)
    found = Index(place, "train", 16)
    for start in range(0, found.samples_per_epoch, 4):
        found.rows(start, min(4, found.samples_per_epoch - start))
    assert len(reads) == len(found._groups) > 20 and set(reads.values()) == {1}


@pytest.mark.parametrize("name", ["train/part-00001.parquet", "manifest.json"])
def test_a_flipped_byte_is_refused_by_name(place, tmp_path, name):
    """Anywhere in the file: either it is refused, or the tokens are the right ones all the same."""
    import shutil

    shutil.copytree(place, tmp_path / "copy")
    target = tmp_path / "copy" / name
    good, expected = target.read_bytes(), pairs(whole_epoch(Index(place, "train", 64)))
    refused = 0
    tried = random.Random(0).sample(range(len(good)), 60)
    for at in tried:
        bad = bytearray(good)
        bad[at] ^= 0x10
        target.write_bytes(bad)
        try:
            assert pairs(whole_epoch(Index(str(tmp_path / "copy"), "train", 64))) == expected
        except folder.Damaged as error:
            assert name in str(error) or "format" in str(error)
            refused += 1
    assert refused > 20
    target.write_bytes(good[: len(good) // 2])
    with pytest.raises(folder.Damaged, match=name):
        whole_epoch(Index(str(tmp_path / "copy"), "train", 64))


def test_mistakes_are_one_line(place, tmp_path):
    with pytest.raises(ValueError, match="length=0"):
        Index(place, "train", 0)
    with pytest.raises(ValueError, match="split='test': choose one of train, val"):
        Index(place, "test")
    with pytest.raises(ValueError, match="start=-1"):
        Index(place).rows(-1, 2)
    with pytest.raises(folder.Damaged, match="no manifest.json"):
        Index(str(tmp_path))
    folder.write(str(tmp_path / "x"), {})
    with pytest.raises(ValueError, match="is not prepared data"):
        Index(str(tmp_path / "x"))


def test_it_is_fast(book):
    found = Index(book, "train", 512)
    found.rows(0, 8)
    started, tokens = time.perf_counter(), 0
    for _ in range(300):
        found.rows(0, 8)
        tokens += 8 * 512
    assert tokens / (time.perf_counter() - started) > 5e6


# ---- the loader


def steps(place, count, **fields):
    with Loader(Index(place, "train", 16, seed=5), **fields) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("world, accumulate", [(1, 1), (1, 4), (2, 1), (2, 3), (4, 3), (12, 1)])
def test_a_step_is_the_same_for_every_world_size(place, world, accumulate):
    alone = steps(place, 6, batch=12)
    parts = [steps(place, 6, batch=12, rank=r, world=world, accumulate=accumulate) for r in range(world)]
    for step in range(6):
        micros = [micro for part in parts for micro in part[step]]
        assert len(micros) == world * accumulate
        for name in ("ids_BT", "targets_BT", "segments_BT"):
            assert torch.equal(torch.cat([micro[name] for micro in micros]), alone[step][0][name])


def test_a_resumed_cursor_goes_on_unbroken(place):
    unbroken = steps(place, 8, batch=12)
    with Loader(Index(place, "train", 16, seed=5), batch=12) as loader:
        for _ in range(3):
            next(loader)
        cursor = loader.cursor
    assert cursor == 36
    for a, b in zip(unbroken[3:], steps(place, 5, batch=12, cursor=cursor), strict=True):
        assert torch.equal(a[0]["ids_BT"], b[0]["ids_BT"])


def test_another_batch_size_takes_up_any_cursor(place):
    rows = [steps(place, 3, batch=12), steps(place, 4, batch=10, cursor=36)]
    seen = torch.cat([step[0]["ids_BT"] for part in rows for step in part])
    assert torch.equal(seen, Index(place, "train", 16, seed=5).rows(0, 76)["ids_BT"])


def test_uneven_batches_are_refused(place):
    found = Index(place)
    with pytest.raises(ValueError, match=r"batch=10 cannot be split evenly: .* world x accumulate = 2 x 3 = 6"):
        Loader(found, batch=10, world=2, accumulate=3)
    with pytest.raises(ValueError, match="rank=2, world=2"):
        Loader(found, batch=4, rank=2, world=2)
    with pytest.raises(ValueError, match="cursor=-1"):
        Loader(found, batch=4, cursor=-1)


def test_it_reads_two_steps_ahead_and_stops(place):
    found, asked = Index(place, "train", 16), []
    original = found.rows
    found.rows = lambda *arguments: asked.append(arguments) or original(*arguments)
    loader = Loader(found, batch=4)
    next(loader)
    time.sleep(0.3)
    assert 3 <= len(asked) <= 4  # one taken, two wait, one more in hand
    loader.close()
    assert not [t for t in threading.enumerate() if t is loader._thread]
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_an_error_of_the_thread_reaches_the_consumer(place):
    found = Index(place, "train", 16)
    original, calls = found.rows, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return original(*arguments)

    found.rows = failing
    with Loader(found, batch=4) as loader:
        next(loader)
        next(loader)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(loader)
