"""Keys and their limits, over the real application and with a clock that is set."""

import pytest
from starlette.testclient import TestClient

from serve.engine import Engine
from serve.http.api import create_app
from serve.http.keys import Bucket, Caller, Key, Keys, caller, digest, plain, read
from serve.http.served import Served, Service
from serve.worker import Worker

HERE, FAR = ("127.0.0.1", 1234), ("192.0.2.1", 1234)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def worker(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=2, max_len=200), waiting=8)
    yield worker
    worker.stop()


def http(worker, keys=(), client=HERE, **headers) -> TestClient:
    return TestClient(create_app(Service.of(Served.local(worker, "tiny"), keys=keys)), client=client, headers=headers)


def ask(client, key: str, **body):
    body = {"model": "tiny", "prompt": "def", "max_tokens": 4, "ignore_eos": True, **body}
    return client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})


def key(name: str, **limits) -> Key:
    return Key(name=name, sha256=digest(name.encode()), **limits)


def test_without_keys_this_machine_only(worker):
    assert http(worker).get("/v1/models").status_code == 200
    for client in (http(worker, client=FAR), http(worker, **{"X-Forwarded-For": "127.0.0.1"})):
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == 200


def test_with_keys_everybody_who_has_one(worker):
    client = http(worker, ["one", key("two")], client=FAR)
    assert ask(client, "one").status_code == ask(client, "two").status_code == 200
    for wrong in ("three", "", "o", "one two", "\u00e4".encode()):
        answer = client.get(
            "/v1/models",
            headers={"Authorization": b"Bearer " + (wrong if isinstance(wrong, bytes) else wrong.encode())},
        )
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_requests_a_minute(worker):
    client = http(worker, [key("few", requests_per_minute=2), key("many")])
    answers = [ask(client, "few") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert (
        answers[2].json()["error"]["message"].startswith("2 requests a minute are allowed with this key; try again in ")
    )
    assert (
        answers[2].json()["error"]["code"] == "rate_limit_exceeded"
        and 25 <= int(answers[2].headers["Retry-After"]) <= 30
    )
    assert client.get("/v1/models", headers={"Authorization": "Bearer few"}).status_code == 200
    assert ask(client, "many").status_code == 200 and "x-ratelimit-limit-requests" not in ask(client, "many").headers


def test_tokens_a_minute(worker):
    """Prompt and completion are charged when they are done, streamed or not; the debt is waited for."""
    client = http(worker, [key("few", tokens_per_minute=60)])
    first = ask(client, "few", max_tokens=40)
    used = first.json()["usage"]["total_tokens"]
    assert first.status_code == 200 and used > 40
    second = ask(client, "few", max_tokens=40, stream=True)
    assert second.status_code == 200 and int(second.headers["x-ratelimit-remaining-tokens"]) <= 60 - used + 1
    third = ask(client, "few")
    assert third.status_code == 429 and int(third.headers["Retry-After"]) >= 2 * used - 60 - 2


def test_concurrent_requests(worker):
    limited = Keys([key("one", concurrent=1)])
    found = limited.find("Bearer one")
    found.running += 1
    refusal = found.refusal()
    assert refusal.status == 429 and "1 requests run with this key already, 1 are allowed" in refusal.message
    found.running -= 1
    assert found.refusal() is None
    client = http(worker, [key("one", concurrent=1)])
    assert [ask(client, "one").status_code for _ in range(3)] == [200] * 3  # one after the other
    assert [ask(client, "one", stream=True).status_code for _ in range(3)] == [200] * 3


def test_buckets_fill_up_steadily():
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(100)
    assert bucket.level() == -40 and bucket.wait() == 41
    clock.now = 41
    assert bucket.wait() == 0 and bucket.wait(60) == 59
    clock.now = 1000
    assert bucket.level() == 60
    free = Bucket(None, clock)
    free.take(1e9)
    assert free.wait() == 0
    assert Caller(key("free"), clock).headers() == {}


def test_requests_know_whose_they_are(worker, monkeypatch):
    seen = []
    submit = worker.engine.submit
    monkeypatch.setattr(worker.engine, "submit", lambda request: seen.append(request) or submit(request))
    assert ask(http(worker, [key("urgent", priority=-3), key("other")]), "urgent").status_code == 200
    assert (seen[0].key, seen[0].priority) == ("urgent", -3)
    assert caller() is None


def test_administration_needs_its_own_right(worker):
    client = http(worker, [key("user"), key("boss", admin=True)])
    assert client.post("/admin/models", headers={"Authorization": "Bearer user"}).status_code == 403
    assert client.post("/admin/models", headers={"Authorization": "Bearer boss"}).status_code == 404  # without Ray


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys.toml"
    first, second = '[[key]]\nname = "a"\nkey = "secret"\nconcurrent = 2\n', '[[key]]\nname = "b"\nsha256 = '
    path.write_text(f'{first}{second}"{digest(b"two")}"')
    one, two = read(str(path))
    assert one.sha256 == digest(b"secret") and one.concurrent == 2 and "secret" not in repr(one)
    assert Keys([one, two]).find("bearer two").key.name == "b"
    for text, message in [
        ("", "not a file of"),
        ("key = 3", "not a file of"),
        ("[[key]]\nname = 'a'\nsha256 = 'x'", "sha256: String should match"),
        ("[[key]]\nname = 'a'\nkey = 'x'\nlimit = 3", "limit: Extra inputs"),
        ("[[key]]\nname = 'a'\nkey = 'x'\n[[key]]\nname = 'a'\nkey = 'y'", "each with its own name"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read(str(path))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        read(str(tmp_path / "none"))
    assert len(plain("a, b,, ")) == 2
