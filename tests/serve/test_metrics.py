"""What Prometheus reads adds up to what was done."""

import asyncio
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from serve.engine import Engine
from serve.http.api import Served, Service, create_app
from serve.http.metrics import FINISHED, REFUSED
from serve.worker import Worker


@pytest.fixture
def client(decoder, tokenizer):
    workers = [Worker(Engine(decoder, tokenizer, max_rows=2, max_len=2000), waiting=2) for _ in range(2)]
    models = [Served.local(worker, name, replica="abc") for worker, name in zip(workers, ("tiny", "other"))]
    yield TestClient(create_app(Service.of(*models)), client=("127.0.0.1", 1))
    for worker in workers:
        worker.stop()


def scrape(client, model: str = "tiny") -> dict[str, float]:
    """Series by name, or name and reason."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found, families = {}, list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        for sample in family.samples:
            assert sample.labels["replica"] == "abc"
            if sample.labels["model_name"] == model and "le" not in sample.labels:
                reason = sample.labels.get("finished_reason") or sample.labels.get("reason")
                name = sample.name.removeprefix("edifice_")
                found[f"{name} {reason}" if reason else name] = sample.value
    return found


def ended(found) -> dict[str, float]:
    return {reason: found[f"request_success_total {reason}"] for reason in FINISHED}


def refused(found) -> dict[str, float]:
    return {reason: found[f"request_refused_total {reason}"] for reason in REFUSED}


def post(client, **body):
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "def", "ignore_eos": True, **body})


def test_counts(client):
    start = scrape(client)
    assert start["num_requests_running"] == start["generation_tokens_total"] == sum(ended(start).values()) == 0
    usage = post(client, max_tokens=9, n=2).json()["usage"]
    text = post(client, max_tokens=9, seed=1).json()["choices"][0]["text"]
    post(client, max_tokens=9, seed=1, stop=text[2:5], stream=True)
    post(client, max_tokens=5000)
    post(client, n=5)
    found = scrape(client)
    assert ended(found) == {"stop": 1, "length": 3, "cancelled": 0, "deadline": 0, "failed": 0}
    assert refused(found) == {"invalid": 2, "overloaded": 0, "failed": 0}
    assert found["prompt_tokens_total"] == 3 * usage["prompt_tokens"]
    assert found["request_prompt_tokens_sum"] == 4 * usage["prompt_tokens"]
    assert 27 < found["generation_tokens_total"] <= 36
    assert found["request_generation_tokens_sum"] == found["generation_tokens_total"]
    assert found["time_to_first_token_seconds_count"] == found["e2e_request_latency_seconds_count"] == 4
    assert found["inter_token_latency_seconds_count"] == found["generation_tokens_total"] - 4
    assert 0 < found["inter_token_latency_seconds_sum"] < found["e2e_request_latency_seconds_sum"] < 240
    for name in ("queue", "prefill", "decode", "inference"):
        assert found[f"request_{name}_time_seconds_count"] == 4
    times = [found[f"request_{name}_time_seconds_sum"] for name in ("queue", "prefill", "decode", "inference")]
    assert times[1] + times[2] == pytest.approx(times[3])
    assert times[0] + times[3] < found["e2e_request_latency_seconds_sum"]
    assert found["iteration_tokens_total_count"] == found["num_steps_total"]
    assert found["iteration_tokens_total_sum"] >= found["generation_tokens_total"]
    assert found["num_requests_running"] == 0 and 0 <= found["kv_cache_usage_perc"] <= 1
    assert found["num_generated_tokens_total"] == found["generation_tokens_total"]
    assert sum(ended(scrape(client, "other")).values()) == 0


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
        assert (await asyncio.to_thread(post, client)).status_code == 429
        left.set()
        await asyncio.wait_for(task, 10)
        return during

    during = asyncio.run(main())
    assert (during["num_requests_running"], during["num_requests_waiting"]) == (2, 2)
    start = time.monotonic()
    while scrape(client)["num_requests_running"]:
        assert time.monotonic() - start < 5
        time.sleep(0.01)
    found = scrape(client)
    assert (ended(found)["cancelled"], refused(found)["overloaded"], ended(found)["length"]) == (4, 1, 0)
    assert post(client, max_tokens=2, n=4).status_code == 200


def test_a_broken_engine_is_counted(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=2, max_len=200))
    client = TestClient(create_app(Service.of(Served.local(worker, "tiny", replica="abc"))), client=("127.0.0.1", 1))
    worker.engine.memory.put = None
    assert post(client, n=2).status_code == 503
    assert post(client).status_code == 503
    found = scrape(client)
    assert ended(found)["failed"] == 2 and refused(found)["failed"] == 1
