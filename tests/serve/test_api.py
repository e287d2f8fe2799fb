"""The HTTP routes without Ray: shapes, errors in OpenAI's form, and who may come in."""

import json
import threading
import time

import pytest
from starlette.testclient import TestClient

from serve.engine import Engine
from serve.http.api import Served, Service, create_app
from serve.worker import Worker

HERE = ("127.0.0.1", 1234)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def worker(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=2, max_len=200), waiting=2)
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def client(worker):
    return TestClient(create_app(Service.of(Served.local(worker, "tiny"))), client=HERE)


def post(client, **body):
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "def", "max_tokens": 4, **body})


def test_prompts_of_every_shape(client, worker):
    ids = worker.engine.prompts.encode("def")
    texts = []
    for prompt in ("def", ids, ["def"], [ids]):
        answer = post(client, prompt=prompt, temperature=0).json()
        texts.append(answer["choices"][0]["text"])
        assert answer["usage"]["prompt_tokens"] == len(ids)
    assert len(set(texts)) == 1
    answer = post(client, prompt=["def", "for"], n=2, seed=7, ignore_eos=True).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    tokens = sum(len(worker.engine.prompts.encode(text)) for text in ("def", "for"))
    counts = {"prompt_tokens": tokens, "completion_tokens": 16, "total_tokens": tokens + 16}
    assert counts.items() <= answer["usage"].items()
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}


def test_echo_comes_before_the_completion(client, tokenizer, worker):
    plain = post(client, seed=1).json()["choices"][0]["text"]
    assert post(client, seed=1, echo=True).json()["choices"][0]["text"] == "def" + plain
    lines = post(client, seed=1, echo=True, stream=True).text.split("\n\n")
    pieces = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
    assert pieces[0] == "def" and "".join(pieces) == "def" + plain
    ids = worker.engine.prompts.encode("def")
    assert post(client, prompt=ids, seed=1, echo=True).json()["choices"][0]["text"] == "def" + plain


def test_null_and_neutral_values_change_nothing(client):
    plain = post(client, seed=1).json()["choices"]
    neutral = {
        "logprobs": None,
        "stop": None,
        "n": None,
        "frequency_penalty": 0.0,
        "best_of": 1,
        "user": "me",
        "suffix": None,
    }
    assert post(client, seed=1, **neutral).json()["choices"] == plain
    assert post(client, seed=-3).status_code == 200


@pytest.mark.parametrize(
    "body, status, param, message",
    [
        ({"model": "other"}, 404, "model", "the model 'other' does not exist; this server has 'tiny'"),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens: must be at least 1, or 0 with echo=true"),
        ({"max_tokens": -1}, 400, "max_tokens", "max_tokens: input should be greater than or equal to 0"),
        ({"max_tokens": "4"}, 400, "max_tokens", "max_tokens: input should be a valid integer"),
        ({"temperature": -1}, 400, "temperature", "temperature: input should be greater than or equal to 0"),
        ({"top_p": 0}, 400, "top_p", "top_p: input should be greater than 0"),
        ({"prompt": [1, "a"]}, 400, "prompt", "prompt: must be a text, a list of texts"),
        ({"prompt": []}, 400, "prompt", "prompt: must be a text, a list of texts"),
        ({"prompt": [[]]}, 400, "prompt", "prompt: must be a text, a list of texts"),
        ({"prompt": [10**6]}, 400, "prompt", "prompt: token 1000000 is not in the vocabulary"),
        ({"max_tokens": 500}, 400, "prompt", "together at most 200 are allowed"),
        ({"stop": ["a", ""]}, 400, "stop", "stop: must be a text or a list of at most 16 texts, none of them empty"),
        ({"stop": 5}, 400, "stop", "stop: must be a text or a list of at most 16 texts"),
        ({"logprobs": 6}, 400, "logprobs", "logprobs: input should be less than or equal to 5"),
        ({"frequency_penalty": 3}, 400, "frequency_penalty", "frequency_penalty: input should be less than or equal"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias", "logit_bias: input should be less than or equal to 100"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "logit_bias: string should match pattern"),
        ({"logit_bias": 5}, 400, "logit_bias", "logit_bias: input should be a valid dictionary"),
        ({"top_k": 2**70}, 400, "top_k", "top_k: input should be less than"),
        ({"logit_bias": {"5000": 1}}, 400, "logit_bias", "logit_bias: token 5000 is not in the vocabulary"),
        ({"stop_token_ids": [5000]}, 400, "stop_token_ids", "stop_token_ids: token 5000 is not in the vocabulary"),
        ({"min_tokens": 5}, 400, "min_tokens", "min_tokens: must be at most max_tokens=4"),
        ({"min_p": 2}, 400, "min_p", "min_p: input should be less than or equal to 1"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty", "repetition_penalty: input should be greater than"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "response_format: must be {"),
        ({"response_format": "json"}, 400, "response_format", "response_format: must be {"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "b"}}}},
            400,
            "response_format",
            "response_format: the grammar cannot be followed: Invalid type: b",
        ),
        ({"structured_outputs": {"regex": "(a"}}, 400, "structured_outputs", "structured_outputs: the grammar cannot"),
        ({"structured_outputs": {}}, 400, "structured_outputs", "structured_outputs: must have exactly one of"),
        (
            {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
            400,
            "ignore_eos",
            "ignore_eos: not together with structured_outputs",
        ),
        ({"suffix": "x"}, 400, "suffix", "suffix: not supported"),
        ({"best_of": 2}, 400, "best_of", "best_of: not supported"),
        ({"colour": "red"}, 400, "colour", "colour: extra inputs are not permitted"),
        (
            {"stream_options": {"include_usage": True}},
            400,
            "stream_options",
            "stream_options: allowed only with stream",
        ),
        ({"temperature": float("nan")}, 400, "temperature", "temperature: input should be a finite number"),
        ({"top_p": float("inf")}, 400, "top_p", "top_p: input should be a finite number"),
        ({"messages": []}, 400, "messages", "messages: extra inputs are not permitted"),
        ({"prompt": "a\ud800"}, 400, "prompt", "prompt: must be Unicode text, and there is half a character"),
        ({"prompt": ["a", "\udfff"]}, 400, "prompt", "prompt: must be Unicode text, and there is half a character"),
        ({"stop": ["a", "\ud800"]}, 400, "stop", "stop: must be Unicode text"),
        ({"user": "\ud800"}, 400, "user", "user: must be Unicode text"),
        ({"\ud800": 1}, 400, None, "unable to parse raw data as a unicode string"),
        ({"prompt": "a" * 2601}, 400, "prompt", "prompt has 2601 bytes, more than any 200 tokens of this model"),
        ({"prompt": ["a"] * 5}, 400, "prompt", "prompt: 5 completions in one request, at most 4 are allowed"),
        ({"n": 5}, 400, "prompt", "prompt: 5 completions in one request, at most 4 are allowed"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_errors(client, body, status, param, message):
    # Not `post`: httpx itself refuses NaN and half a character.
    content = json.dumps({"model": "tiny", "prompt": "def", "max_tokens": 4, **body})
    answer = client.post("/v1/completions", content=content, headers=JSON)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error["type"], error["param"]) == (status, "invalid_request_error", param)
    assert message in error["message"] and "\n" not in error["message"]


def test_other_errors_have_the_same_shape(client):
    for answer, status in [
        (client.post("/v1/completions", content=b"{"), 400),
        (client.post("/v1/completions", json=[1]), 400),
        (client.post("/v1/completions", json={"prompt": "a"}), 400),
        (client.get("/v1/completions"), 405),
        (client.get("/v1/chat/completions"), 405),
        (client.get("/v1/nothing"), 404),
        (client.get("/docs"), 404),
        (client.get("/v1/models/other"), 404),
    ]:
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get("/v1/models/tiny").json()["id"] == client.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_large_bodies(client):
    """In one piece, and in many that do not tell how many there will be."""
    body = json.dumps({"model": "tiny", "prompt": "a" * 2**22}).encode()
    for content in (body, (body[start : start + 2**20] for start in range(0, len(body), 2**20))):
        answer = client.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == 413
        assert "the body has more than the 1048576 bytes that are allowed" in answer.json()["error"]["message"]
    start = time.monotonic()
    for prompt in ("a" * 1_000_000, [1] * 100_000 + ["a"], ["a"] * 100_000):
        assert post(client, prompt=prompt).status_code == 400
    assert time.monotonic() - start < 5


def test_what_nobody_expected_has_the_same_shape(worker, monkeypatch):
    client = TestClient(
        create_app(Service.of(Served.local(worker, "tiny"))), client=HERE, raise_server_exceptions=False
    )
    monkeypatch.setattr(worker.engine.prompts, "encode", None)
    answer = post(client)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_encoding_is_done_beside_the_event_loop(client, worker, monkeypatch):
    threads, encode = [], worker.engine.prompts.encode

    def told(text):
        threads.append(threading.current_thread().name)
        return encode(text)

    monkeypatch.setattr(worker.engine.prompts, "encode", told)
    assert post(client).status_code == 200
    assert post(client, prompt=["a"] * 3, n=2).status_code == 400  # too many: before anything is encoded
    assert len(threads) == 1 and threads[0].startswith("asyncio_")


def test_a_completion_that_breaks_leaves_the_engine_alone(client, worker, monkeypatch):
    import serve.engine

    def broken(logits_BC, samplings, positions):
        raise IndexError("no such row")

    with monkeypatch.context() as patched:
        patched.setattr(serve.engine, "sample", broken)
        answer = post(client, n=2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "completion_failed")
        assert answer.json()["error"]["message"] == "a completion broke: IndexError: no such row"
        assert '"completion_failed"' in post(client, stream=True).text
    assert client.get("/health").status_code == 200 and worker._open == 0
    assert (
        'request_success_total{finished_reason="failed",model_name="tiny",replica=""} 3.0'
        in client.get("/metrics").text
    )
    assert post(client, top_p=1e-46).status_code == 200


def test_keys(worker):
    client = TestClient(create_app(Service.of(Served.local(worker, "tiny"), keys=["one", "two"])), client=HERE)
    assert client.get("/health").json() == {"status": "ok"}
    for key, status in [(None, 401), ("three", 401), ("on", 401), ("", 401), ("one", 200), ("two", 200)]:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == status
        if status == 401:
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert client.get("/metrics", headers=headers).status_code == 401
            assert client.post("/v1/completions", content=b"{", headers=headers).status_code == 401


def test_without_keys_only_this_machine_is_served(worker):
    app = create_app(Service.of(Served.local(worker, "tiny")))
    for host, status in [("127.0.0.1", 200), ("127.8.8.8", 200), ("::1", 200), ("10.0.0.7", 401), ("elsewhere", 401)]:
        client = TestClient(app, client=(host, 1))
        assert client.get("/v1/models").status_code == status
        assert client.get("/health").status_code == 200


def test_too_many_requests_and_a_broken_engine(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=1, max_len=200), waiting=0)
    client = TestClient(create_app(Service.of(Served.local(worker, "tiny"))), client=HERE)
    worker._open = 1  # as if a stream were open
    answer = post(client)
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["Retry-After"]) >= 1
    assert post(client, stream=True).status_code == 429
    worker._open = 0
    worker.engine.memory.put = None
    assert post(client).status_code == 503
    assert client.get("/health").status_code == 503
    assert post(client).json()["error"]["type"] == "server_error"
