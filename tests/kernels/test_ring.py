"""Sequences over ranks: what each case of ring_ranks.py found in groups of 1 to 4 real processes.

Starting processes is most of the cost, so they are started once, for all cases, when the first is asked for.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from kernels.ring import positions, shard, unshard
from tests.kernels.ring_ranks import CASES, RANKS

ROOT = Path(__file__).parents[2]
SECONDS = 300  # for all cases on a busy machine


@functools.cache
def results():
    """(ranks, name) of a case -> what went wrong in it on any rank, "" for nothing."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / f"{rank}.txt" for rank in range(RANKS)]
        processes = [start(rank, folder, path) for rank, path in enumerate(said)]
        try:
            watch(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        tails = "\n".join(f"rank {rank}: {path.read_text()[-2000:]}" for rank, path in enumerate(said))
        found = {(ranks, name): "" for name, (where, _) in CASES.items() for ranks in where}
        for rank in range(RANKS):
            lines = Path(folder) / f"{rank}.jsonl"
            done = {(n, name): error for n, name, error in map(json.loads, lines.read_text().splitlines())}
            for at in found:
                error = done.get(at, f"did not end; the processes said\n{tails}") if rank < at[0] else ""
                found[at] += f"\nrank {rank}: {error}" if error else ""
    return found


def start(rank, folder, output):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__).parent / "ring_ranks.py"), str(rank), folder]
    (Path(folder) / f"{rank}.jsonl").touch()
    with open(output, "w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def watch(processes):
    """Until all have ended, one has failed, or time is up."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes):
            time.sleep(1)  # the others may be about to say what they saw
            return
        time.sleep(0.05)


@pytest.mark.parametrize("ranks, name", [(ranks, name) for name, (where, _) in CASES.items() for ranks in where])
def test_as_on_one_rank(ranks, name):
    assert not results()[ranks, name]


@pytest.mark.parametrize("balance", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_shards_make_the_whole(balance, ranks):
    x = torch.randn(2, 30 * ranks, 3)
    parts = [shard(x, rank, ranks, balance) for rank in range(ranks)]
    assert torch.equal(unshard(parts, balance), x)
    assert torch.equal(unshard([shard(x.mT, r, ranks, balance, dim=2) for r in range(ranks)], balance, dim=2), x.mT)
    for rank, part in enumerate(parts):
        assert torch.equal(x[:, positions(rank, ranks, 30, balance)], part)


def test_zigzag_is_the_early_and_the_late():
    assert [shard(torch.arange(8)[None], rank, 2).tolist() for rank in (0, 1)] == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="10 tokens must be a multiple of 4"):
        shard(torch.zeros(1, 10), 0, 2)
    with pytest.raises(ValueError, match="balance='zag'"):
        shard(torch.zeros(1, 8), 0, 2, "zag")
    with pytest.raises(ValueError, match="T=5 must be even"):
        positions(0, 2, 5)
