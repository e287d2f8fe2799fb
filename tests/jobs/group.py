"""Real processes for tests: their environment, free ports, and ranks that are joined."""

import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    """Ports nobody has, below those Ray gives to workers."""
    found, sockets = [], []
    for port in range(7100 + secrets.randbelow(2000), 10_000):
        each = socket.socket()
        try:
            each.bind(("127.0.0.1", port))
        except OSError:
            each.close()
            continue
        found.append(port)
        sockets.append(each)
        if len(found) == count:
            break
    for each in sockets:
        each.close()
    return found


def environment(**variables: object) -> dict[str, str]:
    """This process's, with the repository importable and nothing of a cluster that a person may use."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])  # `python` of a job is this one
    fixed = {"PYTHONPATH": paths, "PATH": path, "OMP_NUM_THREADS": "1"}
    return {**kept, **fixed, **{name: str(value) for name, value in variables.items()}}


def run_ranks(script: str, ranks: int, *arguments: object, timeout: float = 240) -> None:
    """Runs `script` of this folder as `ranks` processes of one group; AssertionError shows a failed one's output."""
    (port,) = free_ports(1)
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)],
            env=environment(
                RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_SIZE=ranks,
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, DS_ACCELERATOR="cpu",
            ),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        for rank, process in enumerate(started):
            output, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, f"rank {rank} of {script}:\n{output[-4000:]}"
    finally:
        for process in started:
            process.kill()


def wait(condition, seconds: float, what: str) -> None:
    """Until condition() is true; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)
