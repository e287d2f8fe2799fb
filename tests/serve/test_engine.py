"""The engine says what the model says, whatever else it is doing at the same time."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import models
from serve.engine import Engine
from serve.request import Request
from serve.sampler import Sampling

MODELS = {
    "gqa": ("gqa", {}),
    "window": ("gqa", {"window": 8}),
    "gated_deltanet": ("gated_deltanet", {}),
    "hybrid": ("decoder", {"pattern": "3*gated_deltanet gqa", "layers": 4}),
    "spla": ("spla", {}),  # grows by one entry for each token, and for each block
}
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    name, options = MODELS[request.param]
    return models.build(name, vocab=64, dim=32, **options)


def recomputed(model, prompt, tokens) -> list[int]:
    """What the whole sequence in one call, without any state, says at each generated token."""
    with torch.inference_mode():
        logits_BTC, _ = model.logits(torch.tensor([[*prompt, *tokens]]))
    return logits_BTC[0].argmax(-1)[len(prompt) - 1 : -1].tolist()


def run(engine, requests, arrive=None, cancel=None):
    """Steps until all have ended; `arrive[i]` is the step request i comes at, `cancel[i]` the step it is cancelled."""
    arrive, cancel = arrive or [0] * len(requests), cancel or {}
    ids, events, step = {}, {}, 0
    while len(ids) < len(requests) or engine.busy:
        for index, request in enumerate(requests):
            if arrive[index] == step:
                ids[index] = engine.submit(request)
            if cancel.get(index) == step and index in ids:
                engine.cancel(ids[index])
        for event in engine.step():
            index = next(i for i, id in ids.items() if id == event.id)
            events.setdefault(index, []).append(event)
        step += 1
        assert step < 5000
    return events


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_greedy_tokens_are_those_of_the_whole_sequence(model, seed):
    """Random lengths, arrivals, cancellations, chunks, pages so few that rows are sent back."""
    rng = random.Random(seed)
    spec = model.state_spec(64)
    growing = sum(part.bytes(64) for part in spec.values() if part.every and not part.window)
    rest = sum(part.bytes(64) * (1 if part.every else 2) for part in spec.values() if not part.every or part.window)
    rows = rng.randint(1, 5)
    budget = (rows + 1) * rest + int(growing * rng.uniform(1.6, 2.5)) + 4096
    engine = Engine(
        model, max_rows=rows, max_len=64, chunk=rng.randint(1, 20), memory_bytes=budget, page=rng.choice([1, 4, 16])
    )
    requests, arrive, cancel = [], [], {}
    for index in range(rng.randint(1, 8)):
        prompt = [rng.randrange(64) for _ in range(rng.choice([1, 2, 5, 17, 40]))]
        requests.append(Request(prompt, Sampling(max_tokens=rng.randint(1, 24), **GREEDY)))
        arrive.append(rng.randint(0, 12))
        if rng.random() < 0.2:
            cancel[index] = arrive[-1] + rng.randint(1, 12)
    events = run(engine, requests, arrive, cancel)
    for index, request in enumerate(requests):
        tokens = [event.token for event in events[index] if event.token is not None]
        assert tokens == recomputed(model, request.prompt, tokens)
        reason = events[index][-1].reason
        assert [event.reason for event in events[index][:-1]] == [None] * (len(events[index]) - 1)
        assert len(tokens) == request.sampling.max_tokens if reason == "length" else reason == "cancelled"
        assert index in cancel or reason == "length"
    memory = engine.memory
    assert memory.free_rows == memory.rows


def test_pages_running_out_sends_the_youngest_back_and_changes_nothing():
    torch.manual_seed(0)
    model = models.build("gqa", vocab=64, dim=32)
    page_bytes = sum(part.bytes(4) for part in model.state_spec(64).values())
    engine = Engine(model, max_rows=4, max_len=64, memory_bytes=20 * page_bytes, page=4)
    requests = [Request([n + 1] * 10, Sampling(max_tokens=40, **GREEDY)) for n in range(4)]
    events = run(engine, requests)
    assert engine.scheduler.preemptions > 0
    for index, request in enumerate(requests):
        tokens = [event.token for event in events[index]]
        assert tokens == recomputed(model, request.prompt, tokens) and len(tokens) == 40
    with pytest.raises(ValueError, match="more than fit into the engine's memory"):
        Engine(model, max_rows=4, max_len=64, memory_bytes=8 * page_bytes, page=4).submit(requests[0])


def test_sampled_streams_do_not_depend_on_the_batch(model):
    requests = [
        Request([n + 1] * (n + 1), Sampling(max_tokens=12, temperature=0.9, top_p=0.9, seed=n, ignore_eos=True))
        for n in range(6)
    ]
    alone = [Engine(model, max_rows=1, max_len=64).generate([r.prompt], r.sampling)[0].tokens for r in requests]
    engine = Engine(model, max_rows=4, max_len=64, chunk=3)
    together = engine.generate([r.prompt for r in requests], [r.sampling for r in requests])
    assert [result.tokens for result in together] == alone
    assert len({tuple(tokens) for tokens in alone}) == 6


def test_a_stream_goes_on_elsewhere(decoder, tokenizer):
    sampling = Sampling(max_tokens=20, seed=5, stop=("zzzz",), ignore_eos=True)
    whole = Engine(decoder, tokenizer, max_len=64).generate(["def f"], sampling)[0]
    for cut in (1, 7, 19):
        engine = Engine(decoder, tokenizer, max_len=64)
        engine.submit(Request(engine.prompts.encode("def f"), sampling, resumed=whole.tokens[:cut]))
        events = []
        while engine.busy:
            events += engine.step()
        assert [event.token for event in events] == whole.tokens[cut:]
        assert whole.text.endswith("".join(event.text for event in events))
    with pytest.raises(ValueError, match="^resumed: 20 tokens, but max_tokens=20$"):
        engine.submit(Request([1], sampling, resumed=whole.tokens))


def test_long_prompts_do_not_hold_up_those_that_generate(model):
    engine = Engine(model, max_rows=4, max_len=256, chunk=8)
    first = engine.submit(Request([1, 2], Sampling(max_tokens=60, **GREEDY)))
    engine.step()
    engine.submit(Request([3] * 160, Sampling(max_tokens=2, **GREEDY)))
    for _ in range(19):
        assert [event.id for event in engine.step()] == [first]
    assert len(engine.step()) == 2


def test_first_come_first_served(model):
    engine = Engine(model, max_rows=2, max_len=64)
    for n in range(5):
        engine.submit(Request([n + 1], Sampling(max_tokens=3, **GREEDY)))
    order = [event.id for _ in range(10) for event in engine.step() if event.reason]
    assert order == [0, 1, 2, 3, 4] and not engine.busy


def test_cancelling_frees_the_row_before_the_next_step(model):
    engine = Engine(model, max_rows=1, max_len=64)
    first, second, third = (engine.submit(Request([1, 2], Sampling(max_tokens=50, **GREEDY))) for _ in range(3))
    engine.step()
    engine.cancel(first)
    engine.cancel(second)
    events = engine.step()
    assert [(e.id, e.reason) for e in events] == [(first, "cancelled"), (second, "cancelled"), (third, None)]
    engine.cancel(first)
    engine.cancel(third)
    assert [(e.id, e.reason) for e in engine.step()] == [(third, "cancelled")]
    assert not engine.busy and engine.step() == [] and engine.memory.free_rows == 1


@pytest.mark.parametrize("end", ["<|eos|>", "<|end|>"])
def test_the_end_tokens(decoder, tokenizer, first_end, end):
    """Of a document, and of a turn in a chat."""
    engine = Engine(decoder, tokenizer, max_len=64)
    seed, result = first_end(engine, engine.prompts.encode("a"), end)
    assert result.reason == "stop" and not engine.ends.intersection(result.tokens[:-1])
    assert result.text == tokenizer.decode(result.tokens[:-1])
    same = engine.generate(["a"], Sampling(max_tokens=30, temperature=3.0, seed=seed, ignore_eos=True))[0]
    assert same.tokens[: len(result.tokens)] == result.tokens and len(same.tokens) == 30
    assert same.reason == "length" and same.text == tokenizer.decode(same.tokens)


def test_further_end_tokens(decoder, tokenizer):
    engine = Engine(decoder, tokenizer, max_len=64, ends=["<|user|>", "not there"])
    assert engine.ends == {tokenizer.token_to_id(each) for each in ("<|eos|>", "<|end|>", "<|user|>")}


def test_stop_texts_end_a_completion(decoder, tokenizer):
    engine = Engine(decoder, tokenizer, max_len=128)
    sampling = Sampling(max_tokens=60, seed=3, ignore_eos=True)
    whole = engine.generate(["def f"], sampling)[0]
    assert whole.text == tokenizer.decode(whole.tokens)
    for at in (0, 5, 17):  # also across tokens: any three letters in a row
        stop = whole.text[at : at + 3]
        result = engine.generate(["def f"], Sampling(**{**vars(sampling), "stop": (stop, "never there")}))[0]
        assert result.reason == "stop" and result.text == whole.text[: whole.text.index(stop)]
        assert len(result.tokens) < 60


def test_events_of_others_are_kept_while_generate_blocks(model):
    engine = Engine(model, max_rows=2, max_len=64)
    other = engine.submit(Request([1], Sampling(max_tokens=3, **GREEDY)))
    engine.generate([[2]], Sampling(max_tokens=5, **GREEDY))
    events = engine.step()
    assert [event.id for event in events] == [other] * 3 and not engine.busy


def test_what_can_never_be_answered_is_refused_in_one_line(model, tokenizer):
    engine = Engine(model, max_rows=2, max_len=64)
    plain = Sampling(max_tokens=4)
    for request, message in [
        (Request([], plain), "^prompt: must have at least one token$"),
        (Request([64], plain), "^prompt: token 64 is not in the vocabulary of 64 tokens$"),
        (Request([-1], plain), "^prompt: token -1 is not in the vocabulary"),
        (Request([1] * 61, plain), "^prompt has 61 tokens and max_tokens is 4: together at most 64 are allowed$"),
        (Request([1], Sampling(stop=("a",))), "^stop: the model has no tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(request)
    assert not engine.busy
    with pytest.raises(ValueError, match="^prompt: the model has no tokenizer"):
        engine.generate(["text"])
    with pytest.raises(ValueError, match="^2 prompts but 1 samplings$"):
        engine.generate([[1], [2]], [plain])
    with pytest.raises(ValueError, match="^chunk=0: must be at least 1 token$"):
        Engine(model, chunk=0)
    with pytest.raises(ValueError, match="is not a causal decoder"):
        Engine(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="^EncoderDecoder needs an encoder's output beside each prompt") as error:
        Engine(models.build("encoder_decoder"))
    assert "\n" not in str(error.value)


def test_long_texts_are_refused_without_encoding_them(decoder, tokenizer, monkeypatch):
    engine = Engine(decoder, tokenizer, max_len=20)
    longest = max(tokenizer.get_vocab(), key=lambda token: len(token.encode()))
    most = 20 * len(longest.encode())
    assert longest == "<|assistant|>" and len(engine.prompts.encode(longest * 19)) == 20  # with the one that opens it
    assert engine.prompts.encode("a" * most)
    monkeypatch.setattr(engine, "tokenizer", None)
    for texts in (["a" * (most + 1)], ["a" * most, "b"], ["\u4f60" * (most // 3 + 1)]):
        with pytest.raises(ValueError, match="^prompt has .* bytes, more than any 20 tokens of this model: together"):
            engine.prompts.check_text(*texts)


@pytest.mark.parametrize("where", ["sample", "logprobs", "text"])
def test_a_request_that_breaks_ends_alone(decoder, tokenizer, where, monkeypatch):
    """The others say what they would have said."""
    import serve.engine

    engine = Engine(decoder, tokenizer, max_rows=4, max_len=64)
    samplings = [Sampling(max_tokens=9, seed=n, ignore_eos=True, logprobs=n) for n in range(3)]
    expected = [engine.generate([[5, 6]], sampling)[0].tokens for sampling in samplings]

    def breaking(own):
        def broken(logits_BC, given, rest):
            asked = [sampling.logprobs for sampling in given] if where == "sample" else rest
            if 1 in asked:
                raise RuntimeError("it broke")
            return own(logits_BC, given, rest)

        return broken

    if where != "text":
        monkeypatch.setattr(serve.engine, where, breaking(getattr(serve.engine, where)))
    ids = [engine.submit(Request([5, 6], sampling)) for sampling in samplings]
    if where == "text":
        engine._live[ids[1]].text.push = None
    events = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            events[event.id].append(event)
    first, broken, last = events.values()
    assert [[event.token for event in own] for own in (first, last)] == [expected[0], expected[2]]
    assert [(event.token, event.reason) for event in broken] == [(None, "error")] and broken[0].error is not None
    assert engine.memory.free_rows == 4
    if where != "text":
        with pytest.raises(RuntimeError, match="^it broke$"):
            engine.generate([[5, 6]] * 3, samplings)
        assert not engine.busy


def test_a_request_with_nothing_left_to_draw_ends_alone():
    """It is no sign of a broken model, so the engine goes on."""
    torch.manual_seed(0)
    engine = Engine(models.build("decoder", vocab=8, dim=16, layers=1, pattern="gqa"), max_len=20)
    with pytest.raises(FloatingPointError):
        engine.generate([[1]], Sampling(seed=1, min_tokens=1, stop_token_ids=tuple(range(8))))
    assert len(engine.generate([[1]], Sampling(max_tokens=3, seed=1))[0].tokens) == 3


def test_the_engine_needs_neither_ray_nor_a_web_server():
    import subprocess
    import sys

    unwanted = "'ray', 'fastapi', 'deepspeed', 'transformers'"
    code = f"import sys, serve.engine; print([name for name in ({unwanted}) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
