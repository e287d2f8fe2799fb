"""`python -m serve.chat` in a pseudo-terminal and in a pipe, against the real application with tiny models."""

import copy
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import uvicorn

from serve.chat import harmless
from serve.engine import Engine
from serve.http.api import create_app
from serve.http.served import Served, Service
from serve.sampler import Sampling
from serve.template import Template
from serve.worker import Worker

MAX_LEN = 6000
COMMAND = [sys.executable, "-m", "serve.chat"]
GREEDY = ["--temperature", "0", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def model(decoder, tokenizer):
    """Never ends an answer when it is greedy: the best logit is above 0."""
    model = copy.deepcopy(decoder)
    with torch.no_grad():
        model.head.weight[[tokenizer.token_to_id(end) for end in ("<|eos|>", "<|end|>")]] = 0
    return model


@pytest.fixture(scope="module")
def worker(model, tokenizer):
    engine = Engine(model, tokenizer, max_rows=4, max_len=MAX_LEN)
    engine.generate([[0, 0]], Sampling(max_tokens=2))  # kernels are built once; a worker would take it for a stall
    worker = Worker(engine, stall=60)
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def url(worker, tokenizer):
    """A server with a key, and two names of one model: with a template and without."""
    models = Served.local(worker, "tiny", Template(tokenizer)), Served.local(worker, "plain")
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(Service.of(*models, keys=["secret"])), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    yield f"http://127.0.0.1:{place.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    place.close()


@pytest.fixture(scope="module")
def reply(model, tokenizer):
    """What the model says to some messages."""
    engine, template = Engine(model, tokenizer, max_rows=1, max_len=512), Template(tokenizer)

    def reply(*messages: str, system: str = "", tokens: int = 12) -> str:
        roles = ["user", "assistant"] * len(messages)
        turns = [{"role": role, "content": text} for role, text in zip(roles, messages)]
        turns = [{"role": "system", "content": system}] * bool(system) + turns
        return engine.generate([template.encode(turns)], Sampling(max_tokens=tokens, temperature=0))[0].text

    return reply


class Person:
    """Types and reads at a terminal."""

    def __init__(self, *arguments: str) -> None:
        self.side, other = pty.openpty()
        environment = {**os.environ, "EDIFICE_API_KEY": "secret", "TERM": "dumb", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as what runs in the background passes on
        )  # fmt: skip
        os.close(other)
        self.seen = ""

    def read(self, until: str, seconds: float = 30) -> str:
        """What is shown up to the pattern `until`, which is taken away too."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(until, self.seen)):
            left = deadline - time.monotonic()
            assert left > 0, f"{until!r} never came after {self.seen!r}"
            if select.select([self.side], [], [], left)[0]:
                self.seen += os.read(self.side, 65536).decode(errors="replace").replace("\r\n", "\n")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, line: str, until: str = r"\n> ") -> str:
        """Types a line; what is shown until the next prompt, without the echo."""
        os.write(self.side, line.encode() + b"\n")
        return self.read(until).removeprefix(line + "\n").removesuffix("\n> ")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def person(url):
    people = []

    def person(*arguments: str) -> Person:
        people.append(Person("--url", url, *arguments))
        people[-1].read("> ")
        return people[-1]

    yield person
    for each in people:
        each.process.kill()
        each.process.wait()
        os.close(each.side)


def shown(answer: str) -> str:
    return harmless(answer)


def test_a_conversation_and_its_commands(person, reply, tmp_path):
    one = person(*GREEDY)
    first = reply("def f")
    said = one.type("def f")
    assert said.startswith(shown(first) + "\n") and "12 tokens, " in said and "first after" in said
    second = reply("def f", first, "two\nlines")
    os.write(one.side, b"two\\\n")
    one.read(r"\. ")
    assert one.type("lines").startswith(shown(second) + "\n")

    path = tmp_path / "kept.json"
    assert "4 messages" in one.type(f"/save {path}")
    kept = json.loads(path.read_text())
    assert [turn["content"] for turn in kept["messages"]] == ["def f", first, "two\nlines", second]

    assert "forgotten" in one.type("/clear")
    assert "return" in one.type("/system return")
    assert one.type("def f").startswith(shown(reply("def f", system="return")) + "\n")
    assert one.type("/model") == "* tiny\n  plain"
    assert "has no model 'other'; it has tiny, plain" in one.type("/model other")
    assert "now plain" in one.type("/model plain")
    assert "12 tokens" in one.type("def f"), "continued, as it has no template"
    assert "/save FILE" in one.type("/help") and "is not a command" in one.type("/save")
    assert "No such file" in one.type(f"/save {tmp_path}/none/kept.json")
    os.write(one.side, b"/quit\n")
    assert one.process.wait(10) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(person, worker, reply):
    one = person("--temperature", "0")
    os.write(one.side, b"def f\n")
    one.read("def f\n")
    begin = shown(reply("def f")).strip()[:5]
    one.read(re.escape(begin))
    assert worker.stats()["running"] == 1
    one.interrupt()
    one.read(r"\[stopped\]\n> ")
    deadline = time.monotonic() + 10
    while worker.stats()["running"]:
        assert time.monotonic() < deadline, "the server stops too"
        time.sleep(0.02)
    one.interrupt()  # at the prompt: a new line
    one.read("> ")
    assert "2 messages" in one.type("/save /dev/null")
    os.write(one.side, b"\x04")
    assert one.process.wait(10) == 0


def run(*arguments: str, lines: str = "", key: str = "secret") -> subprocess.CompletedProcess:
    environment = {**os.environ, "EDIFICE_API_KEY": key}
    return subprocess.run(
        [*COMMAND, *arguments], input=lines, capture_output=True, text=True, env=environment, timeout=60
    )


def test_in_a_pipe_there_are_only_answers(url, reply):
    done = run("--url", url, *GREEDY, lines="def f\n\nfor\n")
    first = reply("def f")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{first}\n{reply('def f', first, 'for')}\n"


def test_errors_are_one_line(url):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    for done, message in [
        (run("--url", nobody), f"no server answers at {nobody}: [Errno 111] Connection refused; --url names another\n"),
        (run("--url", "nonsense"), "no server answers at nonsense: unknown url type: 'nonsense/v1/models'; --url"),
        (run("--url", url, key="wrong"), "API keys"),
        (run("--url", url, "--model", "other"), "the server has no model 'other'; it has tiny, plain\n"),
        (run("--url", url, "--temperature", "-1", lines="hi\n"), "temperature: "),
    ]:
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_an_answer_cannot_steer_the_terminal():
    assert harmless("a\x1b[2J\x1b]0;title\x07\x9b\tb\n") == "a\ufffd[2J\ufffd]0;title\ufffd\ufffd\tb\n"
