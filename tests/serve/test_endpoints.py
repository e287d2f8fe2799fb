"""What clients ask of a server besides plain text: forms, embeddings, usage, tokens; and what operators ask."""

import asyncio
import json
import threading

import jsonschema
import openai
import pytest
import torch
from starlette.testclient import TestClient

from serve.engine import Engine
from serve.grammar import GrammarError
from serve.http.api import Served, Service, create_app
from serve.http.errors import broken
from serve.http.limits import Limits
from serve.replicas.wire import pack_events, unpack_event
from serve.request import Event
from serve.sampler import Sampling
from serve.template import Template
from serve.worker import Worker

JSON = {"Content-Type": "application/json"}
MESSAGES = [{"role": "user", "content": "def f"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def http(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=4, max_len=600), waiting=8)
    app = create_app(Service.of(Served.local(worker, "tiny", Template(tokenizer))))
    yield TestClient(app, client=("127.0.0.1", 1))
    worker.stop()


@pytest.fixture(scope="module")
def client(http):
    return openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=http, max_retries=0)


@pytest.fixture(scope="module")
def ask(client):
    def ask(**options):
        return client.chat.completions.create(model="tiny", messages=MESSAGES, **options)

    return ask


@pytest.fixture(scope="module")
def complete(client):
    def complete(prompt="def f", **options):
        return client.completions.create(model="tiny", prompt=prompt, **options)

    return complete


def test_answers_in_a_form(ask, complete):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
    ended = 0
    for seed in range(4):
        options = {"response_format": form, "seed": seed, "max_tokens": 300}
        whole = ask(**options).choices[0]
        chunks = [chunk.choices[0] for chunk in ask(**options, stream=True)]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
        assert chunks[-1].finish_reason == whole.finish_reason
        if whole.finish_reason == "stop":
            jsonschema.validate(json.loads(whole.message.content), SCHEMA)
            ended += 1
    assert ended
    cut = ask(response_format=form, seed=1, max_tokens=3).choices[0]
    assert cut.finish_reason == "length" and '{"name": "'.startswith(cut.message.content[:5])
    assert ask(response_format={"type": "json_object"}, max_tokens=20).choices[0].message.content.startswith("{")
    both = complete(n=2, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert {choice.text for choice in both.choices} <= {"yes", "no"}
    assert {choice.finish_reason for choice in both.choices} == {"stop"}


def test_biases_and_ends(complete, tokenizer):
    token = tokenizer.token_to_id("x")
    only = complete(logit_bias={str(token): 100}, max_tokens=5, temperature=0).choices[0]
    assert only.text == "xxxxx"
    end = complete(logit_bias={str(token): 100}, extra_body={"stop_token_ids": [token], "ignore_eos": True}).choices[0]
    assert (end.text, end.finish_reason) == ("", "stop")
    eager = {str(tokenizer.token_to_id("<|eos|>")): 100}
    assert complete(logit_bias=eager, max_tokens=9).usage.completion_tokens == 1
    late = complete(logit_bias=eager, max_tokens=9, extra_body={"min_tokens": 4})
    assert late.usage.completion_tokens == 5 and late.choices[0].finish_reason == "stop"


def test_sampling_fields_reach_the_engine(complete, decoder, tokenizer):
    engine = Engine(decoder, tokenizer, max_len=100)
    fields = {"min_p": 0.2, "repetition_penalty": 1.3, "top_k": 7, "ignore_eos": True}
    answer = complete(max_tokens=20, seed=3, temperature=1.5, extra_body=fields)
    expected = engine.generate(["def f"], Sampling(max_tokens=20, seed=3, temperature=1.5, **fields))[0]
    assert answer.choices[0].text == expected.text


def test_usage(complete, ask):
    options = {"max_tokens": 6, "seed": 1, "stream": True, "extra_body": {"ignore_eos": True}}
    continuous = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = complete(**options, stream_options=continuous)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == last.usage.completion_tokens == 6 and last.choices == []
    long = "for i in range(10): print(i) " * 8
    first, second = (complete(long, max_tokens=2).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0 and first.prompt_tokens == second.prompt_tokens
    assert 0 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


def test_embeddings(client, http, decoder, tokenizer):
    """The decoder's own output at the last token, of length 1, in both encodings, alone or among others."""
    texts = ["def f", "wer Gr\u00fc\u00dfe sagt", "for"]
    found = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    bos = tokenizer.token_to_id("<|bos|>")
    for text, one, other in zip(texts, found.data, plain.data):
        ids = [bos, *tokenizer.encode(text).ids]
        with torch.inference_mode():
            x_D = decoder.hidden(torch.tensor([ids]))[0][0, -1]
        torch.testing.assert_close(torch.tensor(one.embedding), x_D / x_D.norm(), atol=1e-5, rtol=1e-4)
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        alone = client.embeddings.create(model="tiny", input=[ids]).data[0].embedding
        assert alone == pytest.approx(one.embedding, abs=1e-5)
    assert [each.index for each in found.data] == [
        0,
        1,
        2,
    ] and found.usage.prompt_tokens == found.usage.total_tokens > 8
    for body, message in [
        ({"input": "a", "dimensions": 4}, "dimensions: not supported by this server; leave it out"),
        ({"input": []}, "input: must be a text, a list of texts, a list of token ids, or a list of such lists"),
        ({"input": [5000]}, "input: token 5000 is not in the vocabulary of 300 tokens"),
        ({"input": "a " * 700}, "input has "),
    ]:
        answer = http.post("/v1/embeddings", json={"model": "tiny", **body})
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message)
        assert answer.json()["error"]["param"] == next(iter({*body} - {"input"}), "input")


def test_embeddings_end_with_their_client_and_their_time(decoder, tokenizer, monkeypatch):
    """While a step of the engine lasts: the application itself, whose client leaves."""
    worker, step = Worker(Engine(decoder, tokenizer, max_rows=1, max_len=60)), threading.Event()
    limits = Limits(answer_seconds=1e-9)
    app = create_app(Service.of(Served.local(worker, "tiny"), limits=limits))
    body = json.dumps({"model": "tiny", "input": ["a", "b"]}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/embeddings",
        "query_string": b"",
        "client": ("127.0.0.1", 1),
    }
    scope["headers"] = [(b"content-type", b"application/json")]

    async def leave():
        async def receive():
            while len(messages) == 1 and not worker.engine.busy:
                await asyncio.sleep(0.01)
            return messages.pop(0)

        async def send(message):
            pass

        await asyncio.wait_for(app(scope, receive, send), 30)

    try:
        answer = TestClient(app, client=("127.0.0.1", 1)).post("/v1/embeddings", content=body, headers=JSON)
        assert answer.status_code == 503 and "within 1e-09 seconds" in answer.json()["error"]["message"]
        own = worker.engine.step
        monkeypatch.setattr(worker.engine, "step", lambda: step.wait() and own())
        asyncio.run(leave())
        assert worker.engine.busy
    finally:
        step.set()
        worker.stop()


def test_tokens(http, tokenizer):
    def tokenize(**body):
        return http.post("/tokenize", json={"model": "tiny", **body}).json()

    ids = tokenizer.encode("def f").ids
    told = tokenize(prompt="def f", return_token_strs=True)
    assert told["tokens"] == [tokenizer.token_to_id("<|bos|>"), *ids]
    assert told["token_strs"] == [tokenizer.id_to_token(token) for token in told["tokens"]]
    assert (told["count"], told["max_model_len"]) == (len(ids) + 1, 600)
    assert tokenize(prompt="def f", add_special_tokens=False)["tokens"] == ids
    assert tokenize(messages=MESSAGES)["tokens"] == Template(tokenizer).encode(MESSAGES)
    back = http.post("/detokenize", json={"model": "tiny", "tokens": told["tokens"]}).json()
    assert back == {"prompt": "<|bos|>def f"}
    wrong = http.post("/detokenize", json={"model": "tiny", "tokens": [300]})
    assert wrong.json()["error"]["message"] == "tokens: 300 is not in the vocabulary of 300 tokens"


def test_what_operators_ask(http):
    assert http.get("/health").json() == http.get("/ping").json() == http.get("/ready").json() == {"status": "ok"}
    assert set(http.get("/version").json()) == {"version"}
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 600
    empty = TestClient(create_app(Service({})), client=("127.0.0.1", 1))
    assert empty.get("/health").status_code == 200 and empty.get("/ready").status_code == 503
    answer = empty.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert answer.status_code == 404 and "this server has none" in answer.json()["error"]["message"]


def test_a_completion_is_cut_off_when_its_time_is_over(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=1, max_len=50_000))
    app = create_app(Service.of(Served.local(worker, "tiny"), limits=Limits(answer_seconds=0.3)))
    http = TestClient(app, client=("127.0.0.1", 1))
    body = {"model": "tiny", "prompt": "a", "max_tokens": 49_000, "ignore_eos": True, "n": 2}  # the second one waits
    choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["deadline"] * 2
    assert choices[0]["text"] and not choices[1]["text"]
    worker.stop()


def test_a_grammar_that_proves_too_complex_on_the_way(http):
    """It is the request that is at fault, also when the engine is in another process."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "structured_outputs": {"regex": "(a{1000}){1000}b"}}
    answer = http.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "grammar_too_complex") and "too complex" in error["message"]
    sent = pack_events([(1, Event(1, None, "", "error", error=GrammarError("the grammar is too complex here")))])
    there = broken(unpack_event(sent[0]).error)
    assert (there.status, there.code) == (400, "grammar_too_complex") and "GrammarError" not in there.message
