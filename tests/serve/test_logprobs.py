"""Log probabilities are the model's own, at every token, and come to clients in OpenAI's two forms."""

import math
from collections import Counter

import openai
import pytest
import torch
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders
from tokenizers import models as token_models

from serve.engine import Engine
from serve.http.api import Served, Service, create_app
from serve.http.logprobs import Speller
from serve.sampler import Sampling, sample
from serve.template import Template
from serve.worker import Worker

PROMPT = "wer Gr\u00fc\u00dfe"


@pytest.fixture(scope="module")
def engine(decoder, tokenizer):
    return Engine(decoder, tokenizer, max_len=100)


@pytest.fixture(scope="module")
def client(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=3, max_len=100))
    http = TestClient(
        create_app(Service.of(Served.local(worker, "tiny", Template(tokenizer)))), client=("127.0.0.1", 1)
    )
    yield openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=http, max_retries=0)
    worker.stop()


def recomputed(model, prompt, tokens) -> torch.Tensor:
    """(T, C) log probabilities at the generated tokens, of one call without any state."""
    with torch.inference_mode():
        logits_BTC, _ = model.logits(torch.tensor([[*prompt, *tokens]]))
    return logits_BTC[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_they_are_those_of_the_whole_sequence_whatever_shapes_the_draw(engine, decoder):
    prompts = [engine.prompts.encode(text) for text in (PROMPT, "def", "for i in", "x")]
    samplings = [
        Sampling(max_tokens=20, seed=1, logprobs=3),
        Sampling(max_tokens=15, seed=2, temperature=0.3, top_p=0.5, logprobs=0, ignore_eos=True),
        Sampling(max_tokens=15, seed=3),
        Sampling(max_tokens=20, seed=4, frequency_penalty=1.5, logprobs=20, ignore_eos=True),
    ]
    for prompt, sampling, result in zip(prompts, samplings, engine.generate(prompts, samplings)):
        if sampling.logprobs is None:
            assert result.logprobs == []
            continue
        log_TC = recomputed(decoder, prompt, result.tokens)
        assert len(result.logprobs) == len(result.tokens)
        for log_C, token, told in zip(log_TC, result.tokens, result.logprobs):
            assert told.token == pytest.approx(log_C[token].item(), abs=1e-4)
            assert [value for _, value in told.top] == pytest.approx(
                log_C.topk(sampling.logprobs)[0].tolist(), abs=1e-4
            )
            assert all(value == pytest.approx(log_C[top].item(), abs=1e-4) for top, value in told.top)


def test_more_alternatives_than_there_are_tokens():
    import models

    engine = Engine(models.build("gqa", vocab=5, dim=16), max_len=16)
    told = engine.generate([[1]], Sampling(max_tokens=2, seed=0, logprobs=20))[0].logprobs
    for each in told:
        assert len(each.top) == 5 and sum(math.exp(value) for _, value in each.top) == pytest.approx(1)


def test_penalties_are_exact(engine, decoder):
    """Against the definition, one token at a time; a stream that goes on elsewhere remembers what it said."""
    from serve.request import Request

    prompt, tokens = engine.prompts.encode("def def def"), []
    sampling = Sampling(
        max_tokens=30, seed=5, temperature=0.7, frequency_penalty=0.3, presence_penalty=-2.0, ignore_eos=True
    )
    for position in range(30):
        with torch.inference_mode():
            logits_BTC, _ = decoder.logits(torch.tensor([[*prompt, *tokens]]))
        logits_C = logits_BTC[0, -1].clone()
        for token, count in Counter(tokens).items():
            logits_C[token] -= 0.3 * count - 2.0
        tokens += sample(logits_C[None], [sampling], [position])
    others = [Sampling(max_tokens=30, seed=5, temperature=0.7, ignore_eos=True), sampling]
    plain, result = engine.generate([prompt, prompt], others)
    assert result.tokens == tokens != plain.tokens and max(Counter(tokens).values()) > 2
    engine.submit(Request(prompt, sampling, resumed=tokens[:11]))
    events = []
    while engine.busy:
        events += engine.step()
    assert [event.token for event in events] == tokens[11:]
    strong = engine.generate([prompt], Sampling(max_tokens=40, temperature=0.0, frequency_penalty=2.0, ignore_eos=True))
    weak = engine.generate([prompt], Sampling(max_tokens=40, temperature=0.0, ignore_eos=True))
    assert len(set(strong[0].tokens)) > len(set(weak[0].tokens))


@pytest.mark.parametrize("stream", [False, True])
def test_completions(client, engine, stream):
    options = {"prompt": PROMPT, "max_tokens": 30, "seed": 4, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(model="tiny", logprobs=2, stream=stream, **options)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text = "".join(choice.text for choice in choices)
    expected = engine.generate([PROMPT], Sampling(max_tokens=30, seed=4, logprobs=2, ignore_eos=True))[0]
    fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    told = {name: [each for choice in choices for each in getattr(choice.logprobs, name)] for name in fields}
    assert text == expected.text and [len(value) for value in told.values()] == [30] * 4
    assert told["token_logprobs"] == pytest.approx([each.token for each in expected.logprobs], abs=1e-4)
    for token, value, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"]):
        assert top[token] == value and 2 <= len(top) <= 3
    # An offset is where the token's text begins: whole pieces of text stand there.
    assert told["text_offset"][0] == 0 and told["text_offset"] == sorted(told["text_offset"])
    whole = 0
    for token, offset in zip(told["tokens"], told["text_offset"]):
        if not token.startswith(("bytes:", "<|")):
            assert text[offset:].lstrip("\ufffd").startswith(token)
            whole += 1
    assert whole > 5


@pytest.mark.parametrize("stream", [False, True])
def test_chats(client, tokenizer, stream):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], max_tokens=30, seed=4, stream=stream,
        logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True},
    )  # fmt: skip
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in choices)
        content = [each for choice in choices if choice.logprobs for each in choice.logprobs.content]
    else:
        text, content = answer.choices[0].message.content, answer.choices[0].logprobs.content
    assert len(content) == 30
    shown = [each for each in content if not each.token.startswith("<|")]  # special tokens are not text
    assert b"".join(bytes(each.bytes) for each in shown).decode(errors="replace") == text
    for each in content:
        values = [top.logprob for top in each.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True) and each.logprob <= values[0] <= 0


def test_a_stop_text_and_the_end_token_have_theirs(client, engine, first_end):
    options = {"model": "tiny", "prompt": "def f", "max_tokens": 30, "seed": 3, "logprobs": 0}
    whole = client.completions.create(**options, extra_body={"ignore_eos": True}).choices[0]
    answer = client.completions.create(**options, stop=whole.text[6:9], extra_body={"ignore_eos": True})
    choice, tokens = answer.choices[0], answer.usage.completion_tokens
    assert choice.text == whole.text[: whole.text.index(whole.text[6:9])]
    assert choice.logprobs.token_logprobs == pytest.approx(whole.logprobs.token_logprobs[:tokens], abs=1e-4)
    assert choice.logprobs.tokens == whole.logprobs.tokens[:tokens]
    seed, _ = first_end(engine, engine.prompts.encode("a"), "<|eos|>")
    options = {"max_tokens": 30, "temperature": 3.0, "seed": seed}
    choice = client.completions.create(model="tiny", prompt="a", logprobs=0, **options).choices[0]
    assert choice.logprobs.tokens[-1] == "<|eos|>" and choice.finish_reason == "stop"


def test_spellings(tokenizer):
    speller = Speller(tokenizer)
    ids = tokenizer.encode("def \u4f60\n<|end|>").ids
    assert b"".join(map(speller.bytes, ids)).decode() == "def \u4f60\n<|end|>"
    half = tokenizer.token_to_id("\u00e4")  # how a byte-level vocabulary writes byte 0xE4
    assert (speller.bytes(half), speller.spell(half)) == (b"\xe4", "bytes:\\xe4")
    assert (speller.bytes(10**5), speller.spell(10**5)) == (None, "token_id:100000")
    assert Speller(None).spell(7) == "token_id:7" and Speller(None).bytes(7) is None
    other = Tokenizer(token_models.BPE(vocab={"<0xE4>": 0, "\u2581a": 1}, merges=[], byte_fallback=True))
    other.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert [Speller(other).spell(token) for token in (0, 1)] == ["bytes:\\xe4", " a"]
