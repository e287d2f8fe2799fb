"""Preparation in Ray tasks gives the bytes of preparation without Ray, even when no CPU is free."""

from pathlib import Path

from cluster import folder
from jobs.data import Data, prepare


def test_ray_prepares_the_same_folder(tmp_path, monkeypatch):
    data = Data(limit_bytes=2_500_000, tokenizer_bytes=100_000, vocab=400)
    monkeypatch.setenv("EDIFICE_HOME", str(tmp_path / "plain"))
    plain = prepare(data, quiet=True)

    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:

        @ray.remote(num_cpus=1)
        class Holder:
            def ready(self):
                return True

        holder = Holder.remote()
        assert ray.get(holder.ready.remote())
        monkeypatch.setenv("EDIFICE_HOME", str(tmp_path / "ray"))
        spread = prepare(data, quiet=True)
    finally:
        ray.shutdown()
    assert Path(plain.folder).name == Path(spread.folder).name
    assert folder.read_manifest(plain.folder) == folder.read_manifest(spread.folder)
