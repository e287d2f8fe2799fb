"""cluster/folder.py: all there as written, or refused by name; an overwrite never loses the older folder."""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from cluster import folder, storage

TENSORS = {
    "w": torch.arange(12, dtype=torch.float32).view(3, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "step": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(params=["path", "file", "memory"])
def place(request, tmp_path):
    """A folder's place: a plain path, a file:// URI, and a filesystem that is not this machine's disk."""
    return {
        "path": str(tmp_path / "a" / "step-00000001"),
        "file": (tmp_path / "b" / "step-00000001").as_uri(),
        "memory": f"fsspec+memory://{uuid.uuid4().hex}/step-00000001",
    }[request.param]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_write_then_load_gives_the_same(place):
    files = {"model.safetensors": TENSORS, "config.json": '{"a": 1}', "train/x.bin": b"\0\1"}
    folder.write(place, files, {"step": 3})
    found = folder.load(place)
    assert found.meta == {"step": 3}
    assert found.names == ["model.safetensors", "config.json", "train/x.bin"]
    assert same(found.tensors("model.safetensors"), TENSORS)
    assert found.json("config.json") == {"a": 1} and found.bytes("train/x.bin") == b"\0\1"
    assert folder.complete(place)
    folder.verify(place)


def test_tied_and_transposed_tensors_survive(tmp_path):
    w = torch.randn(4, 4)
    tensors = {"a": w, "b": w, "t": w.t(), "slice": w[1:3, ::2], "row": w[2]}
    folder.write(str(tmp_path / "x"), {"m.safetensors": tensors})
    assert same(folder.load(str(tmp_path / "x")).tensors("m.safetensors"), tensors)


def test_no_manifest_is_no_folder(place):
    folder.put(place, "model.safetensors", TENSORS)
    assert not folder.complete(place)
    with pytest.raises(folder.Damaged, match="no manifest.json"):
        folder.load(place)


def test_every_flipped_byte_is_refused_by_name(tmp_path):
    place = tmp_path / "x"
    folder.write(str(place), {"a.bin": b"hello", "m.safetensors": {"w": torch.ones(2)}}, {"step": 1})
    for name in ("a.bin", "m.safetensors", "manifest.json"):
        good = (place / name).read_bytes()
        for at in range(0, len(good), 1 if name == "a.bin" else 7):
            bad = bytearray(good)
            bad[at] ^= 1
            (place / name).write_bytes(bad)
            try:
                folder.verify(str(place))
            except folder.Damaged as error:
                assert name in str(error) or "format" in str(error)
                assert "\n" not in str(error)
            else:  # white space of the manifest may change: it says the same
                assert json.loads(bad) == json.loads(good), f"{name} byte {at}"
        (place / name).write_bytes(good)
    folder.verify(str(place))


def test_missing_and_cut_files_are_refused_by_name(tmp_path):
    place = tmp_path / "x"
    folder.write(str(place), {"a.bin": b"hello", "b.bin": b"world"})
    (place / "b.bin").write_bytes(b"wor")
    assert not folder.complete(str(place))
    with pytest.raises(folder.Damaged, match=r"b\.bin is damaged \(3 bytes instead of 5\)"):
        folder.load(str(place)).bytes("b.bin")
    (place / "b.bin").unlink()
    with pytest.raises(folder.Damaged, match=r"b\.bin is missing"):
        folder.verify(str(place))
    assert folder.load(str(place)).bytes("a.bin") == b"hello"
    with pytest.raises(folder.Damaged, match=r"no file c\.bin; it has a\.bin, b\.bin"):
        folder.load(str(place)).bytes("c.bin")


@pytest.mark.parametrize(
    "name", ["manifest.json", "../x", "/x", "a b", "", "a//b", ".", "./a", "./manifest.json", "a/."]
)
def test_names_are_checked(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be a file of a folder"):
        folder.put(str(tmp_path), name, b"")


def test_overwrite_replaces_everything_and_leaves_no_litter(place):
    folder.write(place, {"model.safetensors": TENSORS, "old.txt": b"old"}, {"step": 1})
    folder.write(place, {"model.safetensors": {"v": torch.ones(3)}, "new.txt": b"new"}, {"step": 2})
    found = folder.load(place)
    assert found.meta == {"step": 2} and same(found.tensors("model.safetensors"), {"v": torch.ones(3)})
    assert [e.path for e in storage.entries(place)] == ["manifest.json", "model.safetensors", "new.txt"]


@pytest.mark.parametrize("operation", range(12))
def test_overwrite_stopped_anywhere_leaves_old_or_new(tmp_path, monkeypatch, operation):
    """Stops the overwrite before its n-th change of the disk; what is left is the old or the new."""
    place = str(tmp_path / "x")
    old, new = {"a.bin": b"old a", "b.bin": b"old b"}, {"a.bin": b"new a", "b.bin": b"new b"}
    folder.write(place, old, {"step": 1})
    changes = 0

    class Stop(Exception):
        pass

    def stopping(function):
        def wrapped(*arguments):
            nonlocal changes
            if changes == operation:
                raise Stop
            changes += 1
            return function(*arguments)

        return wrapped

    for name in ("write", "copy", "delete"):
        monkeypatch.setattr(storage, name, stopping(getattr(storage, name)))
    try:
        folder.write(place, new, {"step": 2})
        stopped = False
    except Stop:
        stopped = True
    monkeypatch.undo()
    assert stopped == (operation < 8)  # 2 puts, 2 manifests, 2 copies, 2 deletions
    folder.verify(place)
    found = folder.load(place)
    contents = {name: found.bytes(name) for name in found.names}
    assert (contents, found.meta["step"]) in ((old, 1), (new, 2))
    folder.write(place, new, {"step": 3})
    folder.verify(place)


def test_killed_writers_leave_no_damaged_folder(tmp_path):
    """A process overwrites one checkpoint for ever; killed at any moment, the folder is whole."""
    code = (
        "import sys; from cluster import folder\n"
        "for step in range(10**9):\n"
        "    folder.write(sys.argv[1], {f'{n}.bin': (b'%d ' % step) * 20000 for n in 'ab'}, {'step': step})\n"
        "    print(step, flush=True)\n"
    )
    place = str(tmp_path / "x")
    for round in range(4):
        process = subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE)
        for _ in range(2 + round):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        folder.verify(place)
        found = folder.load(place)
        for name in ("a.bin", "b.bin"):
            assert found.bytes(name) == (b"%d " % found.meta["step"]) * 20000


def test_latest_and_prune(tmp_path):
    parent = str(tmp_path / "checkpoints")
    assert folder.latest(parent) is None
    for step in (100, 200, 300, 1000):
        folder.write(f"{parent}/step-{step:08d}", {"a.bin": b"x"}, {"step": step})
    folder.write(f"{parent}/best", {"a.bin": b"x"})
    assert folder.latest(parent).endswith("step-00001000")
    Path(parent, "step-00001000", "a.bin").unlink()
    folder.put(f"{parent}/step-00002000", "a.bin", b"being written")
    assert folder.latest(parent).endswith("step-00000300")
    gone = folder.prune(parent, keep=2)
    assert [Path(g).name for g in gone] == ["step-00000100"]
    left = sorted(os.listdir(parent))
    assert left == ["best", "step-00000200", "step-00000300", "step-00001000", "step-00002000"]
    folder.write(f"{parent}/step-00003000", {"a.bin": b"x"})
    folder.prune(parent, keep=1)
    assert sorted(os.listdir(parent)) == ["best", "step-00003000"]
    with pytest.raises(ValueError, match="keep=0"):
        folder.prune(parent, keep=0)


@pytest.mark.parametrize("bad", ["a directory", "unreadable", "file unreadable", "deep"])
def test_one_bad_folder_does_not_hide_the_others(tmp_path, monkeypatch, bad):
    parent = str(tmp_path)
    for step in (3, 4, 5, 6):
        folder.write(f"{parent}/step-{step}", {"a.bin": b"x"})
    manifest = tmp_path / "step-5" / "manifest.json"

    def refused(name):
        function = getattr(storage, name)

        def wrapped(place):
            if "step-5" in place:  # as a mode of 000 gives to everybody but root
                raise PermissionError(13, "Permission denied")
            return function(place)

        monkeypatch.setattr(storage, name, wrapped)

    if bad == "a directory":
        manifest.unlink()
        manifest.mkdir()
    elif bad == "deep":
        manifest.write_text("[" * 200_000)
    else:
        refused("read" if bad == "unreadable" else "info")
    assert not folder.complete(f"{parent}/step-5")
    with pytest.raises(folder.Damaged, match="step-5.*json is damaged" if bad == "deep" else "step-5.*cannot be read"):
        folder.verify(f"{parent}/step-5")
    gone = folder.prune(parent, keep=2)  # what cannot be read may be whole, so only nonsense goes
    assert [Path(g).name for g in gone] == (["step-5", "step-3"] if bad == "deep" else ["step-3"])
    storage.delete(f"{parent}/step-6")
    assert folder.latest(parent).endswith("step-4")


def test_half_a_deletion_is_no_folder(tmp_path, monkeypatch):
    parent, delete = str(tmp_path), storage.delete
    for step in (1, 2):
        folder.write(f"{parent}/step-{step}", {"a.bin": b"x"})

    def once(place):
        monkeypatch.setattr(storage, "delete", None)
        delete(place)

    monkeypatch.setattr(storage, "delete", once)
    with pytest.raises(TypeError):  # stopped after the first deletion
        folder.prune(parent, keep=1)
    assert not folder.complete(f"{parent}/step-1") and folder.complete(f"{parent}/step-2")
    assert Path(parent, "step-1", "a.bin").exists()


def test_files_put_apart_are_sealed_together(place):
    parts = [{"m": torch.full((2,), rank)} for rank in range(3)]
    entries = [folder.put(place, f"optimizer-{rank}.safetensors", part) for rank, part in enumerate(parts)]
    assert not folder.complete(place)
    folder.seal(place, entries, {"world": 3})
    assert folder.load(place).tensors("optimizer-2.safetensors")["m"].tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"put twice .* optimizer-0\.safetensors"):
        folder.seal(place, entries + entries[:1])


def test_a_local_file_can_be_put(place, tmp_path):
    (tmp_path / "source.bin").write_bytes(b"abc" * 5_000_000)
    folder.seal(place, [folder.put(place, "big.bin", tmp_path / "source.bin")])
    assert folder.load(place).bytes("big.bin") == b"abc" * 5_000_000


def test_home_is_an_environment_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("EDIFICE_HOME", str(tmp_path))
    assert storage.home() == str(tmp_path)
    monkeypatch.delenv("EDIFICE_HOME")
    assert storage.home() == str(Path.home() / ".edifice")


def test_unknown_uri_is_one_line():
    with pytest.raises(ValueError, match="cannot open 'nowhere://x'"):
        storage.read("nowhere://x")
