"""Clients that mean harm or break, over real sockets: each is told or dropped; a stream beside them is unchanged."""

import http.client
import json
import socket
import threading
import time
from contextlib import ExitStack

import pytest
import uvicorn

from serve.engine import Engine
from serve.http.api import Served, Service, create_app
from serve.http.limits import Limits
from serve.sampler import Sampling
from serve.template import Template
from serve.worker import Worker

LIMITS = Limits(body_bytes=2**20, body_seconds=1.0, send_seconds=1.0, quiet_seconds=5.0)
LENGTH = 400
PROMPT = {"model": "tiny", "prompt": "def f", "seed": 5, "max_tokens": LENGTH, "ignore_eos": True}


@pytest.fixture(scope="module")
def worker(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=4, max_len=50_000), waiting=60)
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def address(worker, tokenizer):
    app = create_app(Service.of(Served.local(worker, "tiny", Template(tokenizer)), limits=LIMITS))
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # what is not read shows soon
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def expected(decoder, tokenizer):
    """Of the stream beside the others."""
    engine = Engine(decoder, tokenizer, max_len=1000)
    return engine.generate(["def f"], Sampling(max_tokens=LENGTH, seed=5, ignore_eos=True))[0].text


@pytest.fixture
def beside(address, expected):
    """A well-behaved stream that runs while the test does, and again until it is over."""
    stop, texts = threading.Event(), []

    def run() -> None:
        while not stop.is_set() or not texts:
            answer = send(address, json.dumps({**PROMPT, "stream": True}).encode())
            lines = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
            texts.append("".join(line["choices"][0]["text"] for line in lines))

    thread = threading.Thread(target=run)
    thread.start()
    yield
    stop.set()
    thread.join(60)
    assert texts and set(texts) == {expected}


@pytest.fixture
def post(address):
    def post(content: bytes | str) -> tuple[int, dict]:
        answer = send(address, content if isinstance(content, bytes) else content.encode())
        return answer.status, json.loads(answer.read())

    return post


def send(address, content: bytes) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
    except (BrokenPipeError, ConnectionResetError):  # it was answered before all was sent
        pass
    return connection.getresponse()


def connect(address) -> socket.socket:
    sock = socket.create_connection(address)
    sock.settimeout(10)
    return sock


def head(length: int) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def request(**body) -> bytes:
    content = json.dumps({**PROMPT, "stream": True, **body}).encode()
    return head(len(content)) + content


def until(condition, seconds: float = 10.0) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.01)


DEEP = "[" * 100_000
HUGE = 2**19
BODIES = {
    "nothing": (b"", 400),
    "no JSON": (b'{"model": "tiny", "prompt": ', 400),
    "other bytes": (bytes(range(256)), 400),
    "invalid UTF-8": (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400),
    "half a character": (b'{"model": "tiny", "prompt": "\\ud800"}', 400),
    "UTF-16": ('{"model": "tiny", "prompt": "\u4f60", "max_tokens": 1}'.encode("utf-16"), 200),  # which JSON may be
    "deep lists": (DEEP.encode(), 400),
    "a deep prompt": (('{"model": "tiny", "prompt": ' + DEEP + "]" * 100_000 + "}").encode(), 400),
    "deep objects": (('{"a":' * 50_000).encode(), 400),
    "a long key": (("{" + json.dumps("k" * HUGE) + ": 1}").encode(), 400),
    "a long number": (('{"model": "tiny", "prompt": "a", "seed": ' + "9" * 200_000 + "}").encode(), 400),
    "a long prompt": (json.dumps({"model": "tiny", "prompt": "a" * HUGE * 2}).encode()[: 2**20], 400),
    "many prompts": (json.dumps({"model": "tiny", "prompt": ["a"] * 100_000}).encode(), 400),
    "many tokens": (json.dumps({"model": "tiny", "prompt": [1] * 100_000}).encode(), 400),
    "too many values": (json.dumps({"model": "tiny", "prompt": [[1]] * 140_000}).encode(), 413),
    "many fields": (json.dumps({f"k{number}": 1 for number in range(50_000)}).encode(), 400),
    "too much": (b"[" + b" " * 2**20 + b"]", 413),
    "infinity": (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400),
    "twice the same": (b'{"model": "tiny", "model": "tiny", "prompt": "a", "max_tokens": 1}', 200),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(post, name):
    content, status = BODIES[name]
    got, answer = post(content)
    assert got == status, answer
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert len(answer["error"]["message"]) < 1000


def nested(depth: int) -> dict:
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


EVIL = {
    "deep": nested(200),
    "wide": {"enum": [f"{number}" * 20 for number in range(8000)]},
    "alternatives": {"anyOf": [{"type": "string", "pattern": f"^(a|b)*{n}(a|b){{{n}}}$"} for n in range(60)]},
    "a pattern": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "long": {"type": "string", "minLength": 10**9},
    "many": {"type": "array", "items": {"type": "array", "minItems": 10**6}, "minItems": 10**6},
    "multiples": {"type": "integer", "multipleOf": 1_000_003},
    "itself": {"$ref": "#"},
    "in circles": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "elsewhere": {"$ref": "http://127.0.0.1:1/schema"},
    "a file": {"$ref": "file:///etc/passwd"},
}


def test_schemas(post, beside):
    """Answered, or refused for what they are."""
    for name, schema in EVIL.items():
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        status, answer = post(json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 20, "response_format": form}))
        assert status in (200, 400), (name, answer)
        assert "root:" not in str(answer)
    for regex in ("(a|a)*b" * 50, "a{1000}{1000}{1000}", "(" * 5000, "[" + "a-z" * 5000, "\\p{L}{500}" * 20):
        status, answer = post(json.dumps({"model": "tiny", "prompt": "a", "structured_outputs": {"regex": regex}}))
        assert status in (200, 400), (regex[:20], answer)


def test_slow_senders(address, post, beside):
    """A body must be there in time, however it trickles in."""
    content = json.dumps({**PROMPT, "max_tokens": 1}).encode()
    with ExitStack() as open_ones:
        senders = [open_ones.enter_context(connect(address)) for _ in range(20)]
        for sender in senders:
            sender.sendall(head(len(content)))
        for letter in range(8):
            for sender in senders[10:]:  # the others say no more
                sender.sendall(content[letter : letter + 1])
            time.sleep(0.1)
        assert post(content)[0] == 200  # nobody waits for them
        for sender in senders:
            assert sender.recv(100).startswith(b"HTTP/1.1 408 ")


def test_slow_readers(address, worker, beside):
    """A stream that nobody reads is given up, with its row, and never piles up."""
    body = request(max_tokens=40_000, logprobs=5)
    with ExitStack() as open_ones:
        for _ in range(2):
            sock = open_ones.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(address)
            sock.sendall(body)
        until(lambda: len(worker.engine.scheduler.running) >= 2)
        until(lambda: len(worker.engine.scheduler.running) <= 1, 60)  # the stream beside


def test_vanishing_clients(address, worker, beside):
    """Whether they wait for a stream or a whole answer, or have sent half a request."""
    for _ in range(3):
        with ExitStack() as open_ones:
            for number in range(30):
                sock = open_ones.enter_context(connect(address))
                whole = request(max_tokens=40_000, stream=number % 2 == 0)
                sock.sendall(whole if number % 3 else whole[: len(whole) // 2])
            until(lambda: len(worker.engine.scheduler.running) == 4)
        until(lambda: len(worker.engine.scheduler.running) + len(worker.engine.scheduler.waiting) <= 1)


def test_a_thousand_idle_connections(address, post, beside):
    with ExitStack() as open_ones:
        for number in range(1000):
            sock = open_ones.enter_context(connect(address))
            if number % 2:
                sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost")
        assert post(json.dumps({**PROMPT, "max_tokens": 5}))[0] == 200
        assert post(b"")[0] == 400
