"""Tools: calls are found in whatever text, enforced where they must come, and reach clients as OpenAI sends them."""

import json

import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from serve.engine import Engine
from serve.http.api import Served, Service, create_app
from serve.http.tools import Calls
from serve.template import Template
from serve.worker import Worker

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Z\u00fcrich"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]
SCHEMAS = {"weather": WEATHER, "now": {"type": "object", "maxProperties": 0}}
MESSAGES = [{"role": "user", "content": "def f"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def http(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=4, max_len=1200), waiting=8)
    yield TestClient(create_app(Service.of(Served.local(worker, "tiny", Template(tokenizer)))), client=("127.0.0.1", 1))
    worker.stop()


@pytest.fixture(scope="module")
def ask(http):
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=http, max_retries=0)

    def ask(messages=MESSAGES, **options):
        return client.chat.completions.create(model="tiny", messages=messages, **options)

    return ask


def saying(text: str) -> dict:
    """Options with which any model says `text`."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}}


def read(calls: Calls, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls (name, arguments) of an answer that comes in parts."""
    text, found = "", []
    for piece in [*(piece for part in parts for piece in calls.push(part)), *calls.close()]:
        if piece.call is None:
            text += piece.text
        elif piece.name is not None:
            assert piece.call == len(found) and not piece.text
            found.append((piece.name, ""))
        else:
            assert piece.call == len(found) - 1
            found[-1] = (found[-1][0], found[-1][1] + piece.text)
    return text, found


WORDS = st.sampled_from(["a", " ", "<", "<tool", "</tool_call>", "{", "\n", "\u4f60", '{"name"', '"', "\\"])
PROSE = st.lists(WORDS, max_size=6).map("".join)
VALUES = st.recursive(st.text('a"\\{}[]<\u4f60', max_size=5) | st.integers() | st.none(), st.lists, max_leaves=4)
ARGUMENTS = st.dictionaries(st.text('k"}', min_size=1, max_size=3), VALUES, max_size=3)


@settings(max_examples=100, deadline=None)
@given(prose=PROSE, calls=st.lists(st.tuples(st.sampled_from(["f", "g"]), ARGUMENTS), max_size=3), data=st.data())
def test_calls_are_found_however_the_text_is_cut(prose, calls, data):
    written = [f'<tool_call>\n{{"name": "{n}", "arguments": {json.dumps(a)}}}\n</tool_call>' for n, a in calls]
    text = prose + "\n".join(written)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    shown, found = read(Calls(["f", "g"]), parts)
    assert shown == prose and [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_what_is_no_call_stays_text():
    for text in (
        "<tool_call>no JSON</tool_call> x",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
        "a <tool_call>",
        "<tool_call>" + " " * 600,
    ):
        assert read(Calls(["f"]), [*text]) == (text, [])
    assert read(Calls(["f"]), ['<tool_call> {"name":"f","arguments":{"a": [1, "}']) == ("", [("f", '{"a": [1, "}')])


@pytest.mark.parametrize("choice", ["required", "now", "weather"])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_must_come(ask, choice, stream):
    chosen = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    seen = set()
    for seed in range(3):
        options = {"tools": TOOLS, "tool_choice": chosen, "seed": seed, "max_tokens": 600, "temperature": 2.0}
        if stream:
            choices = [chunk.choices[0] for chunk in ask(**options, stream=True)]
            reason = choices[-1].finish_reason
            assert all(not each.delta.content for each in choices)
            calls: list[list[str]] = []
            for delta in (call for each in choices for call in each.delta.tool_calls or ()):
                if delta.id is not None:
                    assert (delta.index, delta.type, delta.function.arguments) == (len(calls), "function", "")
                    calls.append([delta.function.name, ""])
                else:
                    assert delta.index == len(calls) - 1
                    calls[-1][1] += delta.function.arguments
        else:
            answer = ask(**options).choices[0]
            reason, calls = (
                answer.finish_reason,
                [[c.function.name, c.function.arguments] for c in answer.message.tool_calls],
            )
            assert answer.message.content is None and len({c.id for c in answer.message.tool_calls}) == len(calls)
        if reason == "tool_calls":
            for name, arguments in calls:
                jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        assert choice == "required" or len(calls) == 1
        seen |= {name for name, _ in calls}
    assert seen <= ({choice} if choice != "required" else set(SCHEMAS)) and seen


def test_calls_that_a_model_makes_by_itself(ask):
    text = f"Let me see. {CALL}\n{CALL.replace('Bern', 'Basel')}"
    answer = ask(tools=TOOLS, max_tokens=500, **saying(text)).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content == "Let me see. "
    assert [json.loads(call.function.arguments)["city"] for call in answer.message.tool_calls] == ["Bern", "Basel"]
    one = ask(tools=TOOLS, parallel_tool_calls=False, max_tokens=500, **saying(text)).choices[0]
    assert [call.function.name for call in one.message.tool_calls] == ["weather"]
    plain = ask(tools=TOOLS, max_tokens=50, **saying("No <tool> needed")).choices[0]
    assert (plain.message.content, plain.message.tool_calls, plain.finish_reason) == ("No <tool> needed", None, "stop")
    off = ask(tools=TOOLS, tool_choice="none", max_tokens=500, **saying(text)).choices[0]
    assert off.message.content == text and off.message.tool_calls is None
    chunks = list(ask(tools=TOOLS, max_tokens=500, stream=True, **saying(text)))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see. "
    assert len([call for delta in deltas for call in delta.tool_calls or () if call.id]) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_model_reads_tools_calls_and_results(ask, http, tokenizer):
    """And a whole conversation can be sent back."""
    answer = ask(tools=TOOLS, max_tokens=500, **saying(CALL)).choices[0].message
    call = answer.tool_calls[0]
    messages = [*MESSAGES, answer, {"role": "tool", "tool_call_id": call.id, "content": "rain <|end|>"}]
    assert ask(messages, tools=TOOLS, max_tokens=3).choices
    body = {
        "model": "tiny",
        "tools": TOOLS,
        "messages": [m if isinstance(m, dict) else m.model_dump() for m in messages],
    }
    shown = http.post("/tokenize", json=body).json()
    text = tokenizer.decode(shown["tokens"], skip_special_tokens=False)
    head, *turns = text.split("<|system|>")[1].split("<|user|>")
    assert head.startswith("You may call these functions:\n<tools>\n") and head.endswith("</tool_call><|end|>")
    assert [json.loads(line)["function"]["name"] for line in head.splitlines()[2:4]] == ["weather", "now"]
    assert turns[0] == f"def f<|end|><|assistant|>{CALL}<|end|>"
    assert turns[1] == "<tool_response>\nrain <|end|>\n</tool_response><|end|><|assistant|>"
    assert shown["tokens"].count(tokenizer.token_to_id("<|end|>")) == 4  # what the tool wrote is text


def test_errors(http, decoder, tokenizer):
    def refused(**body) -> str:
        answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, **body})
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]["message"]

    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "colour"}}}
    assert refused(tools=[broken], tool_choice="required").endswith(
        "failed to compile JSON schema: Invalid type: colour"
    )
    assert refused(tools=[broken, broken]).startswith("tools: two functions have the same name")
    other = {"type": "function", "function": {"name": "g"}}
    assert refused(tools=TOOLS, tool_choice=other) == "tool_choice: there is no tool 'g'"
    both = {"response_format": {"type": "json_object"}, "tool_choice": "required"}
    assert refused(tools=TOOLS, **both).startswith("tool_choice: a call is required")
    made = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    message = {"role": "assistant", "content": None, "tool_calls": [made]}
    assert refused(messages=[message]) == "messages: the arguments of call '1' are not JSON"
    worker = Worker(Engine(decoder, tokenizer, max_len=100))
    plain = Service.of(Served.local(worker, "tiny", Template(tokenizer, "{{ messages[0].content }}")))
    http = TestClient(create_app(plain), client=("127.0.0.1", 1))
    assert refused(tools=TOOLS) == "tools: this model's chat template does not know of tools"
    worker.stop()
