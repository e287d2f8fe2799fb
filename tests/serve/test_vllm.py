"""vLLM behind our endpoint says, greedily and in float32, what our engine says of the same checkpoint."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from click import ClickException

import models
from models import hub
from serve import app, vllm
from serve.engine import Engine
from serve.replicas import gateway
from serve.sampler import Sampling
from serve.template import Template

PROMPTS = ["def f", "wer Gr\u00fc\u00dfe sagt", "\u4f60\u597d", "for i in range(10): print(i)", "x", ""]
SERVER = Path(__file__).parent / "vllm_server.py"


@pytest.fixture(scope="module")
def llama(tokenizer):
    """Llama's shape, with heads of a width that vLLM has, and sharp logits: no two are nearly equal."""
    torch.manual_seed(0)
    model = models.build("decoder", vocab=tokenizer.get_vocab_size(), dim=128, layers=2, pattern="gqa", ffn="swiglu")
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model.eval()


@pytest.fixture(scope="module")
def engine(llama, tokenizer):
    return Engine(llama, tokenizer, max_rows=4, max_len=256)


@pytest.fixture(scope="module")
def server(llama, tokenizer, tmp_path_factory):
    """(url, what the process told of its engine)."""
    run = tmp_path_factory.mktemp("runs") / "llama"
    hub.save(llama, str(run / "checkpoints" / "step-00000001"), tokenizer.to_str().encode())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "TORCHDYNAMO_DISABLE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SERVER), str(run), str(port)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        line = next((line for line in process.stdout if line.startswith("{")), "")
        assert line, "the server ended before it began"
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(0.05)
        assert process.poll() is None, "the server ended before it answered"
        yield url, json.loads(line)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0, timeout=60)


def test_one_engine_after_the_other_says_the_same(server, engine):
    _, told = server
    greedy = Sampling(max_tokens=24, temperature=0)
    own = engine.generate([[1, 2, 3, 4, 5]], greedy)[0]
    whole = told["whole"]
    assert [event["token"] for event in whole] == own.tokens
    assert "".join(event["text"] for event in whole) == own.text and whole[-1]["reason"] == own.reason
    assert [event["token"] for event in told["resumed"]] == own.tokens[7:]
    assert "".join(event["text"] for event in whole[:7] + told["resumed"]) == own.text, "a stream goes on elsewhere"
    assert [event["offset"] for event in told["resumed"]] == [event["offset"] for event in whole[7:]]
    assert [(event["token"], event["reason"]) for event in told["deadline"]] == [(None, "deadline")]
    assert [event["token"] for event in told["bias"]] == [7, 7]
    assert told["texts"] == [result.text for result in engine.generate(["def f", "for"], greedy)]


def test_completions(client, engine):
    """More of them than rows, at the same time."""

    def ask(prompt):
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=30, temperature=0)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(ask, PROMPTS))
    for prompt, answer in zip(PROMPTS, answers):
        own = engine.generate([prompt], Sampling(max_tokens=30, temperature=0))[0]
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (own.text, own.reason)
        assert answer.usage.completion_tokens == len(own.tokens)


def test_streams_stop_texts_and_chats(client, engine, tokenizer):
    options = {"model": "tiny", "prompt": "for", "max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}}
    own = engine.generate(["for"], Sampling(max_tokens=40, temperature=0, ignore_eos=True))[0]
    chunks = list(client.completions.create(**options, stream=True))
    assert len(chunks) > 3 and "".join(chunk.choices[0].text for chunk in chunks) == own.text
    stop = own.text[5:8]
    answer = client.completions.create(**options, stop=[stop]).choices[0]
    assert (answer.text, answer.finish_reason) == (own.text[: own.text.index(stop)], "stop")
    end = own.tokens[9]
    answer = client.completions.create(
        model="tiny", prompt="for", max_tokens=40, temperature=0, extra_body={"stop_token_ids": [end]}
    )
    assert answer.usage.completion_tokens == own.tokens.index(end) + 1 and answer.choices[0].finish_reason == "stop"

    messages = [{"role": "user", "content": "def f"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0)
    own = engine.generate([Template(tokenizer).encode(messages)], Sampling(max_tokens=20, temperature=0))[0]
    assert answer.choices[0].message.content == own.text


def test_samples_penalties_and_log_probabilities(client, engine):
    options = {"model": "tiny", "prompt": "def f", "max_tokens": 12, "n": 3, "seed": 5}
    first, again = (client.completions.create(**options).choices for _ in range(2))
    assert [c.text for c in first] == [c.text for c in again] and len({c.text for c in first}) == 3
    other = client.completions.create(**{**options, "seed": 6}).choices
    assert [c.text for c in other] != [c.text for c in first]

    sampling = Sampling(max_tokens=12, temperature=0, frequency_penalty=2, presence_penalty=2, logprobs=2)
    own = engine.generate(["def f"], sampling)[0]
    answer = client.completions.create(
        model="tiny",
        prompt="def f",
        max_tokens=12,
        temperature=0,
        frequency_penalty=2,
        presence_penalty=2,
        logprobs=2,
    ).choices[0]
    assert answer.text == own.text
    assert answer.logprobs.token_logprobs == pytest.approx([told.token for told in own.logprobs], abs=1e-3)
    likeliest = [sorted(value for _, value in told.top) for told in own.logprobs]
    for told, top in zip(answer.logprobs.top_logprobs, likeliest):
        assert sorted(told.values())[-2:] == pytest.approx(top, abs=1e-3)

    prompt, score = list(range(6, 70)), Sampling(max_tokens=0, prompt_logprobs=2)
    own = [told.token for told in engine.generate([prompt], score)[0].prompt_logprobs]
    for tokens in (0, 1):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=tokens, echo=True, logprobs=2)
        told = answer.choices[0].logprobs.token_logprobs
        assert answer.usage.completion_tokens == tokens == len(told) - len(prompt)
        assert told[0] is None and told[1 : len(prompt)] == pytest.approx(own, abs=1e-3)


def test_what_is_refused_and_what_is_counted(client, server):
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="engine=vllm follows no grammars"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], response_format=schema
        )
    with pytest.raises(openai.BadRequestError, match="engine=vllm makes no embeddings"):
        client.embeddings.create(model="tiny", input="x")

    def numbers():
        return json.load(urllib.request.urlopen(f"{server[0]}/stats"))["models"]["tiny"]

    prompt = list(range(6, 156))  # more than one of vLLM's blocks
    before = numbers()
    for cached in (0, 128):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=3, temperature=0)
        assert answer.usage.prompt_tokens_details.cached_tokens >= cached
    after = numbers()
    assert after["prefix_hits"] - before["prefix_hits"] >= 128 and after["generated"] > before["generated"]
    stream = client.completions.create(
        model="tiny", prompt="for", max_tokens=240, extra_body={"ignore_eos": True}, stream=True
    )
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while numbers()["running"]:
        assert time.monotonic() < deadline, "the row of a client that went away is free"
    assert numbers()["pages_used"] == 0


def test_a_hugging_face_folder_is_found(llama, tokenizer, tmp_path):
    """As `serve run` looks at it, and a gateway."""
    hub.save_hf(llama, str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    model, _ = app.located(app.Options(model=str(tmp_path), engine="vllm"))
    assert (model.source, model.vocab) == (str(tmp_path), tokenizer.get_vocab_size())
    served = gateway._served(model, "")
    assert served.template is not None and served.prompts.encode("def") == [tokenizer.token_to_id("<|bos|>")] + (
        tokenizer.encode("def").ids
    )
    with pytest.raises(ClickException, match="is served with engine=vllm"):
        app.located(app.Options(model=str(tmp_path)))


def test_models_that_vllm_has_not(model_folder):
    with pytest.raises(ValueError) as refused:
        vllm.load(str(model_folder))
    assert "\n" not in str(refused.value)


def test_it_is_imported_only_when_asked_for():
    code = "import sys, serve.http.api, serve.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
