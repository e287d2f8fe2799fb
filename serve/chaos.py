"""Kills replicas while clients read, and compares every byte with what they read when nobody is killed.

    python -m serve.chaos [--kills 200] [--clients 8] [--replicas 3] [--seed 0] [--dtype bf16] [--batch-invariant]

Starts a server of its own with a tiny random model. First each of a set of requests is answered in peace: completions
and chats, greedy and sampled, with stop texts, penalties, several choices, log probabilities, streamed and whole. Then
clients ask for them again and again while replicas get SIGKILL at random times, now and then all at once. Texts,
tokens, reasons and usage have to be equal; log probabilities to 1e-3, for their last digits depend on batches, and
with --batch-invariant to the last one. Exits with 1 if an answer breaks off or differs; in bf16, where a batch may
decide which of two tokens is drawn, the different ones are counted only, unless nothing depends on the batch.
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cluster import session
from serve.client import Client, ServerError

NAME = "tiny"
EVERY = (0.5, 3.0)  # seconds between two kills
SLOW = 900.0  # seconds: an answer may wait for many restarts
ALL = 0.1  # of the times, all that are there
CLOSE = 1e-3


def bodies(count: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies of requests of all kinds."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        body: dict[str, Any] = {"model": NAME, "max_tokens": rng.randint(100, 600), "stream": index % 4 != 3}
        body |= {"seed": index, "temperature": rng.choice([0, 0.7, 1.0]), "ignore_eos": index % 5 != 4}
        body |= rng.choice([{}, {"n": 2}, {"stop": ["zq", "never there"]}, {"top_p": 0.9, "frequency_penalty": 0.5}])
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        words = " ".join(
            rng.choices(["def", "for", "x", "return", "Gr\u00fc\u00dfe", "\u4f60\u597d"], k=rng.randint(1, 60))
        )
        if index % 3:
            made.append(("/v1/completions", body | {"prompt": words} | ({"logprobs": 2} if index % 2 else {})))
        else:
            message = {"role": "user", "content": words}
            made.append(
                ("/v1/chat/completions", body | {"messages": [message]} | ({"logprobs": True} if index % 2 else {}))
            )
    return made


@dataclass
class Said:
    """What a client was told about one choice."""

    text: str = ""
    reason: str | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, choice: dict[str, Any]) -> None:
        message = choice.get("delta") or choice.get("message") or {}
        self.text += choice.get("text") or message.get("content") or ""
        self.reason = choice["finish_reason"] or self.reason
        told = choice.get("logprobs") or {}
        if "tokens" in told:
            self.tokens += told["tokens"]
            self.logprobs += told["token_logprobs"]
        for one in told.get("content") or ():
            self.tokens.append(one["token"])
            self.logprobs.append(one["logprob"])

    def same(self, other: "Said", within: float) -> bool:
        close = all(abs(a - b) <= within for a, b in zip(self.logprobs, other.logprobs))
        return close and (self.text, self.reason, self.tokens) == (other.text, other.reason, other.tokens)


def ask(client: Client, path: str, body: dict[str, Any]) -> tuple[dict[int, Said], int]:
    """What was said, and how many tokens were charged for. ServerError when the answer breaks off."""
    said: dict[int, Said] = {}
    charged = 0
    for chunk in client.stream(path, body) if body["stream"] else [client.post(path, body)]:
        charged = (chunk.get("usage") or {}).get("completion_tokens", charged)
        for choice in chunk["choices"]:
            said.setdefault(choice["index"], Said()).add(choice)
    return said, charged


class Crowd:
    """Clients that ask until they are told to stop."""

    def __init__(self, client: Client, requests: list, expected: list, given: argparse.Namespace) -> None:
        self.client, self.requests, self.expected = client, requests, expected
        self.within = 0.0 if given.batch_invariant else CLOSE
        self.stopping, self.lock = threading.Event(), threading.Lock()
        self.counts: Counter[str] = Counter()
        seeds = range(given.seed, given.seed + given.clients)
        self.threads = [threading.Thread(target=self._run, args=(seed,)) for seed in seeds]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stopping.is_set():
            index = rng.randrange(len(self.requests))
            path, body = self.requests[index]
            try:
                said, charged = ask(self.client, path, body)
            except ServerError as error:
                self._tell("broken", f"request {index}: {error}")
                continue
            right, tokens = self.expected[index]
            same = (
                said.keys() == right.keys()
                and charged == tokens
                and all(said[n].same(right[n], self.within) for n in right)
            )
            if not same:
                self._tell("different", f"request {index}: {said} instead of {right}")
            with self.lock:
                self.counts["answers"] += 1
                self.counts["streams"] += len(said) * body["stream"]
                self.counts["tokens"] += charged

    def _tell(self, outcome: str, complaint: str) -> None:
        with self.lock:
            self.counts[outcome] += 1
            print(f"{outcome}: {complaint}"[:2000], flush=True)


def make(folder: str) -> None:
    """A tiny random hybrid and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from models import build, hub

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(["def f(x): return x + 1", "for i in range(10): print(i)"] * 4, trainer)
    torch.manual_seed(0)
    model = build("decoder", vocab=tokenizer.get_vocab_size(), dim=32, layers=3, pattern="2*gated_deltanet gqa")
    with torch.no_grad():
        model.head.weight.mul_(6)  # sharp: greedy text varies
    hub.save(model, folder, tokenizer.to_str().encode())


class Killer:
    """Knows the replicas and sends SIGKILL."""

    def __init__(self, application: str) -> None:
        from ray import serve

        self._directory = serve.get_deployment_handle("Directory", application)
        self.killed: set[int] = set()

    def alive(self) -> list[int]:
        places = self._directory.look.remote(0).result().places
        return [place.pid for place in places if place.pid not in self.killed]

    def kill(self, pid: int) -> None:
        self.killed.add(pid)
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--requests", type=int, default=24, help="different ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-invariant", action="store_true")
    given = parser.parse_args()
    import ray
    from ray import serve

    from serve.app import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = os.path.join(tempfile.mkdtemp(prefix="chaos"), NAME)
    make(folder)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("EDIFICE_API_KEYS", None)
    session.serving()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = {"model": folder, "name": NAME, "replicas": str(given.replicas), "cpus": "0", "max_rows": "8"}
        args |= {"dtype": given.dtype, "batch_invariant": str(given.batch_invariant)}
        serve.run(build(args), name=NAME, route_prefix="/")
        crowd, client, kills, seconds = _storm(given, Client(f"http://127.0.0.1:{port}", timeout=SLOW))
        moved = client.get("/stats")["models"][NAME]["moved"]
    finally:
        serve.shutdown()
        ray.shutdown()
    counts = crowd.counts
    print(f"\n{'kills':>7} {'answers':>8} {'streams':>8} {'tokens':>9} {'moved':>6} {'broken':>7} {'different':>10}")
    print(
        f"{kills:7d} {counts['answers']:8d} {counts['streams']:8d} {counts['tokens']:9d} {int(moved):6d} "
        f"{counts['broken']:7d} {counts['different']:10d}   in {seconds:.0f} s"
    )
    exact = given.dtype == "fp32" or given.batch_invariant
    sys.exit(1 if counts["broken"] or (exact and counts["different"]) else 0)


def _storm(given: argparse.Namespace, client: Client) -> tuple[Crowd, Client, int, float]:
    requests = bodies(given.requests, given.seed)
    expected = [ask(client, path, body) for path, body in requests]
    print(f"{len(requests)} requests answered in peace, {sum(tokens for _, tokens in expected)} tokens", flush=True)
    rng, killer = random.Random(given.seed), Killer(NAME)
    begin = time.monotonic()
    crowd = Crowd(client, requests, expected, given)
    told = 0
    try:
        while len(killer.killed) < given.kills:
            time.sleep(rng.uniform(*EVERY))
            alive = killer.alive()
            if len(alive) < 2:  # they come back more slowly than they are killed
                continue
            for pid in alive if rng.random() < ALL else rng.sample(alive, 1):
                killer.kill(pid)
            if len(killer.killed) // 10 > told:
                told = len(killer.killed) // 10
                counts = ", ".join(f"{crowd.counts[name]} {name}" for name in ("answers", "broken", "different"))
                print(f"{len(killer.killed):4d} kills, {time.monotonic() - begin:5.0f} s: {counts}", flush=True)
    finally:
        crowd.stop()
    return crowd, client, len(killer.killed), time.monotonic() - begin


if __name__ == "__main__":
    main()
