"""The chat endpoint through the official OpenAI client, in this process."""

import openai
import pytest
from starlette.testclient import TestClient

from serve.engine import Engine
from serve.http.api import Served, Service, create_app
from serve.sampler import Sampling
from serve.template import Template
from serve.worker import Worker

MAX_LEN = 80
MESSAGES = [{"role": "system", "content": "return"}, {"role": "user", "content": "def f"}]
FREE = {"extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def engine(decoder, tokenizer):
    return Engine(decoder, tokenizer, max_len=MAX_LEN)


@pytest.fixture(scope="module")
def worker(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=4, max_len=MAX_LEN), waiting=4)
    yield worker
    worker.stop()


def connect(service: Service) -> openai.OpenAI:
    http = TestClient(create_app(service), client=("127.0.0.1", 1))
    return openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=http, max_retries=0)


@pytest.fixture(scope="module")
def client(worker, tokenizer):
    return connect(Service.of(Served.local(worker, "tiny", Template(tokenizer))))


@pytest.fixture(scope="module")
def ask(client):
    def ask(messages=MESSAGES, **options):
        return client.chat.completions.create(model="tiny", messages=messages, **options)

    return ask


def test_a_turn_is_what_the_engine_says(ask, engine, tokenizer):
    answer = ask(max_completion_tokens=12, seed=3, n=3, **FREE)
    prompt = Template(tokenizer).encode(MESSAGES)
    expected = engine.generate([prompt] * 3, [Sampling(max_tokens=12, seed=3 + i, ignore_eos=True) for i in range(3)])
    assert [choice.message.content for choice in answer.choices] == [result.text for result in expected]
    assert [(c.index, c.finish_reason, c.message.role) for c in answer.choices] == [
        (index, "length", "assistant") for index in range(3)
    ]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert (answer.object, answer.choices[0].logprobs) == ("chat.completion", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 36)


def test_chunks_are_as_openai_sends_them(ask):
    options = {"max_tokens": 12, "seed": 3, "n": 2, **FREE}
    whole = ask(**options)
    *chunks, last = ask(**options, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == whole.usage
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({c.id for c in (*chunks, last)}) == 1
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert {(each.delta.role, each.finish_reason) for each in own[1:-1]} == {(None, None)}
        assert "".join(each.delta.content for each in own[1:-1]) == choice.message.content
        assert (own[-1].delta.content, own[-1].finish_reason) == (None, "length")
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("end", ["<|end|>", "<|eos|>"])
def test_a_turn_ends_at_its_end_token(ask, engine, tokenizer, first_end, end):
    seed, result = first_end(engine, Template(tokenizer).encode(MESSAGES), end)
    answer = ask(temperature=3, seed=seed, max_tokens=30)
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content == result.text
    assert answer.usage.completion_tokens == len(result.tokens)
    assert "<|" not in answer.choices[0].message.content


def test_without_max_tokens_there_is_as_much_as_there_is_room(ask, tokenizer):
    answer = ask(**FREE)
    assert answer.usage.total_tokens == MAX_LEN and answer.choices[0].finish_reason == "length"


def test_other_ways_to_say_the_same(ask):
    plain = ask(seed=1, max_tokens=6).choices[0].message
    parts = [{"type": "text", "text": "de"}, {"type": "text", "text": "f f"}]
    messages = [{"role": "developer", "content": "return"}, {"role": "user", "content": parts}]
    options = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False}
    assert ask(messages, seed=1, max_completion_tokens=6, max_tokens=6, **options).choices[0].message == plain
    assert ask([*MESSAGES, plain, {"role": "user", "content": "x"}], max_tokens=2).choices  # an answer is sent back


def test_stop_texts(ask):
    options = {"max_tokens": 40, "seed": 3, **FREE}
    whole = ask(**options).choices[0].message.content
    stop = whole[7:10]
    answer = ask(**options, stop=["never there", stop]).choices[0]
    assert (answer.message.content, answer.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    "body, param, message",
    [
        ({"messages": []}, "messages", "messages: must be a list of at least one message"),
        ({"messages": "hi"}, "messages", "messages: must be a list of at least one message"),
        ({"messages": ["hi"]}, "messages", r"messages: must be a list|messages\[0\]"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages",
            r"messages\[0\].tool_call_id: field required",
        ),
        ({"messages": [{"role": "user"}]}, "messages", r"messages\[0\].content: must be a text, or a list of parts"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages",
            r"messages\[0\].content: must be a text, or a list",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            r"messages\[0\].content: must be a text, or a list of parts",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "a"}]},
            "messages",
            r"messages\[1\].role: must be system, developer",
        ),
        ({"extra_body": {"prompt": "a"}}, "prompt", "prompt: extra inputs are not permitted"),
        (
            {"messages": [{"role": "user", "content": "a" * (MAX_LEN * 13 + 1)}]},
            "messages",
            "prompt has 1041 bytes, more than any 80 tokens of this model",
        ),
        ({"tools": [{"type": "function"}]}, "tools", r"tools\[0\].function: field required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", r"tools\[0\].function.name: string"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice: required, and there are no tools"),
        ({"tool_choice": "maybe"}, "tool_choice", "tool_choice: must be none, auto, required or"),
        ({"response_format": {"type": "json"}}, "response_format", "response_format: must be {"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs: allowed only with logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs: input should be less than or equal"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "max_tokens: an older name of"),
        ({"max_tokens": MAX_LEN}, "messages", f"together at most {MAX_LEN} are allowed"),
        (
            {"messages": [{"role": "user", "content": "\u4f60" * 99}]},
            "messages",
            "messages: they are .* tokens, and at",
        ),
    ],
    ids=str,
)
def test_errors(client, body, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **body})
    assert refused.value.param == param and "\n" not in refused.value.message


def test_half_characters(worker, tokenizer):
    http = TestClient(
        create_app(Service.of(Served.local(worker, "tiny", Template(tokenizer)))), client=("127.0.0.1", 1)
    )
    half = "messages[0].content: must be Unicode text"
    call = '{"role": "assistant", "tool_calls": [{"id": "%s", "function": {"name": "f", "arguments": "%s"}}]}'
    for message, told in [
        ('{"role": "user", "content": "\\ud800"}', half),
        ('{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}', half),
        (call % ("\\ud800", "{}"), half),
        (call % ("a", r"{\"a\": \"\\ud800\"}"), "messages: the model's chat template refuses them"),
    ]:
        body = f'{{"model": "tiny", "messages": [{message}]}}'
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
        assert answer.json()["error"]["message"].startswith(told)


def test_models_without_a_template_and_templates_that_refuse(worker, tokenizer):
    for template, message in [
        (None, "messages: this model has no chat template; use /v1/completions"),
        (Template(tokenizer, "{{ raise_exception('no system messages') }}"), "refuses them: no system messages"),
    ]:
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            connect(Service.of(Served.local(worker, "tiny", template))).chat.completions.create(
                model="tiny", messages=MESSAGES
            )
        assert refused.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        connect(Service.of(Served.local(worker, "tiny"))).chat.completions.create(model="other", messages=MESSAGES)
