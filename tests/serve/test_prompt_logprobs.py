"""Log probabilities of prompts are those of one forward pass over them, however the engine came to compute them."""

import json
import random

import pytest
import torch
from starlette.testclient import TestClient

import models
from serve.engine import Engine
from serve.http.api import Served, Service, create_app
from serve.prompt_logprobs import PLACES
from serve.request import Request
from serve.sampler import Sampling
from serve.worker import Worker

VOCAB = 90


@pytest.fixture(scope="module")
def hybrid():
    """A recurrence, a window and attention: fixed state, rings and pages."""
    torch.manual_seed(1)
    return models.build("decoder", vocab=VOCAB, dim=32, layers=3, pattern="gated_deltanet sliding_window gqa")


def log_softmax(model, prompt) -> torch.Tensor:
    """(T - 1, C): of the tokens but the first."""
    with torch.inference_mode():
        return model.logits(torch.tensor([prompt]))[0][0, :-1].log_softmax(-1)


def check(model, prompt, told, count) -> None:
    log_TC = log_softmax(model, prompt)
    assert len(told) == len(prompt) - 1
    for token, one, log_C in zip(prompt[1:], told, log_TC):
        assert one.token == pytest.approx(log_C[token].item(), abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx(log_C.topk(count)[0].tolist(), abs=1e-4)
        assert all(value == pytest.approx(log_C[top].item(), abs=1e-4) for top, value in one.top)


def test_what_the_cache_knows_is_computed_again(hybrid):
    engine = Engine(hybrid, max_rows=2, max_len=256, page=8, chunk=37)
    known = [(7 * place) % VOCAB for place in range(150)]
    engine.generate([known], Sampling(max_tokens=3))
    asks = {count: engine.submit(Request([*known, 5], Sampling(prompt_logprobs=count))) for count in (None, 2)}
    events = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.id, event)
    assert events[asks[None]].cached == 144 and events[asks[2]].cached == 0
    check(hybrid, [*known, 5], events[asks[2]].prompt_logprobs, 2)


@pytest.mark.parametrize("preempt", ["recompute", "offload"])
def test_beside_others_in_odd_chunks_and_preempted(hybrid, preempt):
    """Memory is short, and better ones come: they give way."""
    draw = random.Random(7)
    whole = Engine(hybrid, max_rows=4, max_len=256).memory.bytes
    engine = Engine(hybrid, max_rows=8, max_len=256, memory_bytes=whole, chunk=37, page=8, preempt=preempt)
    known = [draw.randrange(VOCAB) for _ in range(150)]
    engine.generate([known], Sampling(max_tokens=3))
    asked, plain, events = {}, {}, []
    for place in range(8):
        prompt = known[: draw.randrange(0, 150)] + [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 40))]
        most, count = draw.choice([0, 1, 40]), draw.choice([0, 3])
        own = Sampling(max_tokens=most, seed=place, prompt_logprobs=count)
        asked[engine.submit(Request(prompt, own, priority=-place))] = prompt, own
        other = Sampling(max_tokens=30, seed=place)
        plain[engine.submit(Request(known[place:], other, priority=-place))] = known[place:], other
        events += engine.step()  # those that come later are worth more
    while engine.busy:
        events += engine.step()
    assert engine.scheduler.preemptions
    for id, (prompt, sampling) in asked.items():
        mine = [event for event in events if event.id == id]
        assert sum(event.token is not None for event in mine) == sampling.max_tokens
        assert [event.prompt_logprobs is not None for event in mine] == [True] + [False] * (len(mine) - 1)
        assert mine[-1].reason == "length"
        check(hybrid, prompt, mine[0].prompt_logprobs, sampling.prompt_logprobs)
    alone = Engine(hybrid, max_rows=1, max_len=256, prefix_cache=False)
    for id, (prompt, sampling) in plain.items():
        tokens = [event.token for event in events if event.id == id]
        assert tokens == alone.generate([prompt], sampling)[0].tokens, "who asks for nothing gets what it always did"
        assert all(event.prompt_logprobs is None for event in events if event.id == id)


def test_logits_of_a_whole_prompt_never_exist(hybrid):
    seen = []
    hook = hybrid.head.register_forward_hook(lambda head, args, out: seen.append(out[0].shape[:-1].numel()))
    engine = Engine(hybrid, max_len=700, chunk=500)
    try:
        [result] = engine.generate([[1, 2, 3, 4, 5] * 130], Sampling(max_tokens=1, prompt_logprobs=0))
    finally:
        hook.remove()
    assert len(result.prompt_logprobs) == 649 and max(seen) == PLACES


def test_a_resumed_request_has_told_them_already(hybrid):
    engine = Engine(hybrid, max_len=100)
    engine.submit(Request([1, 2, 3], Sampling(max_tokens=4, seed=1, prompt_logprobs=1), resumed=[5]))
    events = []
    while engine.busy:
        events += engine.step()
    assert len(events) == 3 and all(event.prompt_logprobs is None for event in events)


@pytest.fixture(scope="module")
def client(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=3, max_len=100, chunk=7))
    yield TestClient(create_app(Service.of(Served.local(worker, "tiny"))), client=("127.0.0.1", 1))
    worker.stop()


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_over_http(client, decoder, tokenizer, most, stream):
    """As evaluation harnesses ask: texts as token ids, several at a time."""
    texts = ["wer Gr\u00fc\u00dfe sagt", "x", "def f(x): return \u4f60\u597d"]
    prompts = [tokenizer.encode(text).ids for text in texts]
    body = {"model": "tiny", "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": most, "seed": 3}
    answer = client.post("/v1/completions", json={**body, "ignore_eos": True, "n": 2, "stream": stream})
    assert answer.status_code == 200, answer.text
    if stream:
        lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    else:
        choices = answer.json()["choices"]
        assert answer.json()["usage"]["completion_tokens"] == 6 * most
    for index in range(6):
        own = [choice for choice in choices if choice["index"] == index]
        prompt, text = prompts[index // 2], "".join(choice["text"] for choice in own)
        assert text.startswith(texts[index // 2]) and own[-1]["finish_reason"] == "length"
        told = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        for choice in own:
            for name in told if choice["logprobs"] else ():
                told[name] += choice["logprobs"][name]
        assert [len(values) for values in told.values()] == [len(prompt) + most] * 4
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        log_TC = log_softmax(decoder, prompt)
        right = log_TC.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        assert told["token_logprobs"][1 : len(prompt)] == pytest.approx(right, abs=1e-4)
        best = [max(top.values()) for top in told["top_logprobs"][1 : len(prompt)]]
        assert best == pytest.approx(log_TC.amax(-1).tolist(), abs=1e-4)
        for token, offset in zip(told["tokens"], told["text_offset"]):
            assert token.startswith(("bytes:", "<|")) or text[offset:].lstrip("\ufffd").startswith(token)
