"""What Prometheus reads adds up to what was done."""

import asyncio
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from serve.api import Service, create_app
from serve.engine import Engine
from serve.worker import Worker


@pytest.fixture
def client(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=2, max_len=2000), waiting=2)
    yield TestClient(create_app(Service(worker, "tiny", replica="abc")), client=("127.0.0.1", 1))
    worker.stop()


def scrape(client) -> dict[str, float]:
    """Series by name, or name and outcome."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            assert (sample.labels["model"], sample.labels["replica"]) == ("tiny", "abc")
            if "le" not in sample.labels and not sample.name.endswith("_created"):
                found[sample.labels.get("outcome", sample.name.removeprefix("edifice_"))] = sample.value
    return found


def post(client, **body):
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "def", "ignore_eos": True, **body})


def test_counts(client):
    start = scrape(client)
    assert start["requests_running"] == start["stop"] == start["generation_tokens_total"] == 0
    usage = post(client, max_tokens=9, n=2).json()["usage"]
    text = post(client, max_tokens=9, seed=1).json()["choices"][0]["text"]
    post(client, max_tokens=9, seed=1, stop=text[2:5], stream=True)
    post(client, max_tokens=0)
    post(client, max_tokens=5000)
    post(client, n=5)
    found = scrape(client)
    outcomes = {name: found[name] for name in ("stop", "length", "cancelled", "failed", "invalid", "overloaded")}
    assert outcomes == {"stop": 1, "length": 3, "cancelled": 0, "failed": 0, "invalid": 3, "overloaded": 0}
    assert found["prompt_tokens_total"] == 3 * usage["prompt_tokens"]
    assert 27 < found["generation_tokens_total"] <= 36
    assert found["time_to_first_token_seconds_count"] == 4
    assert found["inter_token_seconds_count"] == found["generation_tokens_total"] - 4
    assert 0 < found["inter_token_seconds_sum"] < 60 and found["requests_running"] == 0


def test_who_runs_who_waits_and_who_left(client):
    """The ASGI application itself: a client that leaves in the middle, while others wait and one is refused."""
    body = b'{"model":"tiny","prompt":"a","max_tokens":1900,"ignore_eos":true,"stream":true,"n":4}'

    async def main() -> dict[str, float]:
        left, seen = asyncio.Event(), asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if b"data" in message.get("body", b""):
                seen.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"}
        scope |= {"query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "asgi": {"spec_version": "2.3"}}
        task = asyncio.create_task(client.app(scope, receive, send))
        await asyncio.wait_for(seen.wait(), 10)
        during = await asyncio.to_thread(scrape, client)
        refused = await asyncio.to_thread(post, client)
        assert refused.status_code == 429
        left.set()
        await asyncio.wait_for(task, 10)
        return during

    during = asyncio.run(main())
    assert (during["requests_running"], during["requests_waiting"]) == (2, 2)
    start = time.monotonic()
    while scrape(client)["requests_running"]:
        assert time.monotonic() - start < 5
        time.sleep(0.01)
    found = scrape(client)
    assert (found["cancelled"], found["overloaded"], found["length"]) == (4, 1, 0)
    assert post(client, max_tokens=2, n=4).status_code == 200


def test_a_broken_engine_is_counted(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=2, max_len=200))
    client = TestClient(create_app(Service(worker, "tiny", replica="abc")), client=("127.0.0.1", 1))
    worker.engine.memory.put = None
    assert post(client, n=2).status_code == 503
    assert post(client).status_code == 503
    assert scrape(client)["failed"] == 3
