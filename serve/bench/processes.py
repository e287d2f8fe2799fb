"""Starts what is measured, one at a time, each in a process of its own, and ends it."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.bench import checkpoint
from serve.bench.arrivals import Round

LONG = 900.0  # seconds; what takes longer hangs
ROOT = Path(__file__).parents[2]
Found = dict[int, dict[str, Any]]  # by the number of requests: rounds, and for engines the tokens of the first run


class DidNotRun(Exception):
    """Why, in one line."""


class Crashed(DidNotRun):
    """A signal ended it."""


class Processes:
    """args: of `serve.bench`. folder: of the checkpoint."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(args.threads),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }

    def engine(
        self, name: str, form: str, rows: Sequence[int], tokens: int, rounds: int, simple: bool = False
    ) -> Found:
        """What `serve.bench.engines` measures. DidNotRun."""
        python = self.args.llama_python if name == "llama_cpp" else sys.executable
        options = [name, self.folder, form, "--threads", self.args.threads, "--tokens", tokens, "--rounds", rounds]
        options += ["--prompt", self.args.prompt, *(["--simple"] if simple else []), "--rows", *rows]
        return self._found(python, "serve.bench.engines", options)

    def server(self, kind: str) -> Found:
        """What `serve.bench.clients` measures at one of `serve.bench.server`. DidNotRun."""
        command = [sys.executable, "-m", "serve.bench.server", kind, str(self.folder / "edifice")]
        command += ["--threads", str(self.args.threads)]
        with (self.folder / "server.log").open("w+") as log:
            server = subprocess.Popen(
                command, env=self.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                url = next((line.split()[1] for line in server.stdout if line.startswith("ready ")), "")
                if not url:
                    log.seek(0)
                    raise DidNotRun(_last(log.read()))
                return self._clients(url)
            finally:
                server.stdin.close()
                try:
                    server.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(server.pid, signal.SIGKILL)
                    server.wait()
                server.stdout.close()

    def _clients(self, url: str) -> Found:
        args, vocab = self.args, checkpoint.vocabulary(self.folder)
        options = [url, "llama", "--vocab", vocab, "--tokens", args.tokens, "--rounds", args.rounds]
        options += ["--prompt", args.prompt, "--warm", args.warm, "--rows", *args.rows]
        return self._found(sys.executable, "serve.bench.clients", options)

    def _found(self, python: str, module: str, options: Sequence[object]) -> Found:
        command = [python, "-m", module, *map(str, options)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=LONG)
        except FileNotFoundError:
            raise DidNotRun(f"there is no {python}") from None
        except subprocess.TimeoutExpired:
            raise DidNotRun(f"it took more than {LONG:.0f} seconds") from None
        if done.returncode < 0:
            raise Crashed(f"it ended by {signal.Signals(-done.returncode).name}")
        if done.returncode:
            raise DidNotRun(_last(done.stderr))
        found = json.loads(done.stdout.strip().splitlines()[-1])
        return {int(rows): one | {"rounds": [Round(**each) for each in one["rounds"]]} for rows, one in found.items()}


def _last(text: str) -> str:
    """The line that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return ((errors or lines)[-1] if lines else "it ended without a word")[:160]
