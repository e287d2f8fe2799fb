"""What happens to a running server, while clients read: its replicas are killed, stopped, replaced, scaled; models come
and go. One Ray cluster; nothing is simulated."""

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import session
from serve.chaos import CLOSE, NAME, Killer, ask, bodies
from serve.client import Client

KEY, ADMIN = "secret", "boss"
REQUESTS = bodies(8, seed=1)


class Server:
    """A deployed application, and clients of it."""

    def __init__(self, port: int, folder: str) -> None:
        self.url, self.folder = f"http://127.0.0.1:{port}", folder
        self.client = Client(self.url, KEY, timeout=600)

    def deploy(self, **args: str) -> None:
        from ray import serve

        from serve.app import build

        args = {"model": self.folder, "name": NAME, "cpus": "0", "max_rows": "8", "replicas": "2", **args}
        serve.run(build(args), name=NAME, route_prefix="/")
        self.killer = Killer(NAME)

    def answers(self) -> list:
        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            return list(pool.map(lambda request: ask(self.client, *request), REQUESTS))

    def numbers(self, name: str = NAME) -> dict:
        return self.client.get("/stats")["models"][name]

    def until(self, condition, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.1)

    def admin(self, method: str, path: str, body: dict | None = None, key: str = ADMIN) -> dict:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/admin{path}", data, headers, method=method)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    """Two replicas."""
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(f'[[key]]\nname = "user"\nkey = "{KEY}"\n[[key]]\nname = "boss"\nkey = "{ADMIN}"\nadmin = true\n')
    os.environ["OMP_NUM_THREADS"] = "1"
    session.serving()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        server = Server(port, str(model_folder))
        server.keys = str(keys)
        server.deploy(keys=str(keys), loaded="1")
        yield server
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def expected(server):
    """What unbroken answers are."""
    return server.answers()


def check(answers, expected) -> None:
    for (said, charged), (right, tokens) in zip(answers, expected):
        assert said.keys() == right.keys() and charged == tokens
        assert all(said[index].same(right[index], CLOSE) for index in right)


def during(server, action) -> list:
    """The answers that clients get who asked shortly before `action`."""
    before = server.numbers()["moved"]
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(server.answers)
        server.until(lambda: server.numbers()["running"] > 2)
        action()
        got = answers.result(600)
    assert server.numbers()["moved"] > before
    return got


def test_what_computes_interrupts_the_others(server):
    """A replica's main thread, and Ray that started it, wake up without interrupting; its computing threads may."""
    pid = server.killer.alive()[0]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert os.sched_getscheduler(pid) == os.sched_getscheduler(parent) == os.SCHED_BATCH
    assert os.SCHED_OTHER in {os.sched_getscheduler(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}


def test_kill(server, expected):
    def kill():
        server.killer.kill(server.killer.alive()[0])

    check(during(server, kill), expected)


def test_kill_the_last_one(server, expected):
    """Nobody is there for some seconds, and clients wait."""

    def kill():
        for pid in server.killer.alive():
            server.killer.kill(pid)

    check(during(server, kill), expected)


def test_a_stopped_process(server, expected):
    """It keeps its connections and answers nothing: SIGSTOP. Ray Serve replaces it as well."""
    server.until(lambda: server.numbers()["replicas"] == 2)
    pid = server.killer.alive()[0]
    check(during(server, lambda: os.kill(pid, signal.SIGSTOP)), expected)
    server.killer.killed.add(pid)
    server.until(lambda: len(server.killer.alive()) == 2)


def test_a_rolling_update(server, expected):
    """With another option, so that all replicas and the gateway are replaced while clients ask."""
    pids = set(server.killer.alive())
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(server.deploy, keys=server.keys, loaded="1", chunk="128")
        while not done.done():
            check(server.answers(), expected)
        done.result()
    check(server.answers(), expected)
    assert not pids & set(server.killer.alive())


def test_models_come_and_go(server, expected):
    """And get more replicas when there is more to do."""
    options = {"model": server.folder, "name": "second", "cpus": 0, "max_rows": 1, "most_replicas": 2}
    told = server.admin("POST", "/models", options)
    assert told["id"] == "second" and sorted(server.client.models()) == ["second", NAME]
    path, body = REQUESTS[0]
    with ThreadPoolExecutor(4) as pool:
        while server.numbers("second")["replicas"] < 2:
            check(pool.map(lambda _: ask(server.client, path, {**body, "model": "second"}), range(4)), expected[:1] * 4)
    for method, where, body, key, status in [
        ("POST", "/models", {"model": server.folder, "name": "second"}, ADMIN, 409),
        ("POST", "/models", {"model": "/nowhere"}, ADMIN, 400),
        ("POST", "/models", {"model": server.folder, "rows": 3}, ADMIN, 400),
        ("POST", "/models", {"model": server.folder}, KEY, 403),
        ("DELETE", f"/models/{NAME}", None, ADMIN, 409),
        ("DELETE", "/models/other", None, ADMIN, 404),
    ]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.admin(method, where, body, key)
        assert refused.value.code == status and "message" in json.load(refused.value)["error"]


def test_models_take_turns(server, expected):
    """One that was loaded has room: another one sends it away, and it comes back when it is asked for."""
    server.admin("POST", "/models", {"model": server.folder, "name": "a/third", "cpus": 0})
    assert sorted(server.client.models()) == ["a/third", "second", NAME]
    assert server.client.get("/stats")["models"].keys() == {"a/third", NAME}
    path, body = REQUESTS[0]
    with ThreadPoolExecutor(3) as pool:
        check(pool.map(lambda _: ask(server.client, path, {**body, "model": "second"}), range(3)), expected[:1] * 3)
    assert server.client.get("/stats")["models"].keys() == {"second", NAME}
    for name in ("second", "a/third"):
        assert server.admin("DELETE", f"/models/{name}")["deleted"]
    server.until(lambda: server.client.models() == [NAME])
