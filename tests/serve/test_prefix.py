"""The prefix cache: what is found again changes no token, nothing is lost or lent twice, and what is old makes room."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import models
from serve.drafters.ngram import NGram
from serve.engine import Engine
from serve.request import Request
from serve.sampler import Sampling

STATES = {
    "gqa": {},  # nothing but pages
    "mla": {},
    "gated_deltanet": {},  # nothing but a recurrence
    "mamba_ssd": {},
    "hybrid": {},  # both
    "sliding_window": {},  # rings
    "nsa": {},  # blocks that end after the next has begun, so that pages become final late
    "infllm_v2": {"kernel": 9, "stride": 2},
    "engram": {},  # looks at earlier token ids
    "mixture_of_depths": {},  # pages that are written at a pace of their own
    "mor": {},
}
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=STATES)
def model(request):
    torch.manual_seed(3)
    return models.build(request.param, **STATES[request.param])


def audit(engine) -> None:
    """Every page and slot is free or has as many owners as it counts."""
    memory, cache = engine.memory, engine.cache
    pages, slots = [page for row in memory._owned for page in memory.pages_of(row)], [*memory._owned]
    kept, nodes = set(), [*cache._roots.values()]
    while nodes:
        node = nodes.pop()
        nodes += node.children.values()
        assert all(child.parent is node and child.depth == node.depth + 1 for child in node.children.values())
        pages += [node.page] * bool(node.page)
        if node.checkpoint is not None:
            kept.add(node)
            slots.append(node.checkpoint.slot)
            pages += node.checkpoint.pages
        leaf = node.parent is not None and not node.children and not node.users
        assert (node in cache._idle) == leaf and (not leaf or cache._resumable(node))
    assert kept == set(cache._kept) and sorted([*slots, *memory._free_slots]) == list(range(memory.slots))
    counts = [pages.count(page) for page in range(memory.pages + 1)]
    assert counts == memory._references
    assert sorted(memory._free_pages) == [page for page in range(1, memory.pages + 1) if not counts[page]]


def tokens_of(engine, prompts, sampling=GREEDY):
    return [result.tokens for result in engine.generate(prompts, sampling)]


def events_of(engine, prompt, sampling=GREEDY, **options):
    engine.submit(Request(prompt, sampling, **options))
    events = []
    while engine.busy:
        events += engine.step()
    return events


def test_a_chat_and_what_parts_from_it(model):
    """Turns of a chat, a common beginning with other ends, and the same prompt again."""
    rng = random.Random(1)
    engine, plain = (Engine(model, max_rows=2, max_len=256, prefix_cache=on) for on in (True, False))
    common, chat = [rng.randrange(64) for _ in range(45)], []
    found = []
    for turn in range(4):
        chat += [*(common if not turn else ()), *(rng.randrange(64) for _ in range(9))]
        events = events_of(engine, chat)
        assert [event.token for event in events] == tokens_of(plain, [chat])[0]
        found.append(events[0].cached)
        assert all(event.cached == 0 for event in events[1:])
        chat += [event.token for event in events]
    assert found[0] == 0 and all(0 < len(chat) - cached for cached in found)
    assert found[1] >= 48 and found[2] >= 64 - 16 and found[3] >= 64
    for turn in range(3):
        prompt = common + [60 + turn] * 10
        events = events_of(engine, prompt)
        assert [event.token for event in events] == tokens_of(plain, [prompt])[0]
    assert events[0].cached >= 32
    again = events_of(engine, prompt)
    assert again[0].cached >= 48 and [event.token for event in again] == [event.token for event in events]
    audit(engine)


@pytest.mark.parametrize("model", ["gqa", "hybrid", "sliding_window", "mixture_of_depths"], indirect=True)
def test_together_with_speculation(model):
    """Turns of a chat that repeats itself, drafted for: guesses that were wrong are in no block that is kept."""
    sampling = Sampling(max_tokens=30, temperature=0.0, ignore_eos=True)
    plain = Engine(model, max_len=256, prefix_cache=False)
    engine = Engine(model, max_len=256, drafter=NGram(shortest=1, widest=5))
    engine.speculation.width.choose = lambda rates, ready: 5  # always, whether it pays or not
    chat = [1, 2, 3, 4] * 5
    for turn in range(3):
        events = events_of(engine, chat, sampling)
        assert [event.token for event in events] == tokens_of(plain, [chat], sampling)[0]
        assert bool(events[0].cached) == bool(turn)
        chat += [*(event.token for event in events), 1, 2, 3, 4]
        audit(engine)
    assert engine.speculation.drafted > engine.speculation.accepted > 0


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_random_requests_in_little_memory(model, seed):
    """Requests that begin alike come and go at random, preempted either way; tokens are those of an engine alone."""
    rng = random.Random(seed)
    spec = model.state_spec(96)
    fixed = sum(part.bytes(96) for part in spec.values() if not part.every or part.window)
    growing = sum(part.bytes(96) for part in spec.values() if part.every)
    engine = Engine(
        model,
        max_rows=3,
        max_len=96,
        page=4,
        chunk=rng.choice([5, 16, 64]),
        memory_bytes=8 * fixed + int(rng.uniform(1.5, 3.5) * growing) + 8192,
        preempt=rng.choice(["recompute", "offload"]),
        isolated=rng.random() < 0.3,
    )
    beginnings = [[rng.randrange(64) for _ in range(rng.randint(3, 40))] for _ in range(2)]
    live, requests, got, step = {}, [], {}, 0
    while step < 40 or engine.busy:
        if step < 40 and rng.random() < 0.4:
            prompt = rng.choice(beginnings)[: rng.randint(1, 40)] + [rng.randrange(64)] * rng.randint(0, 9)
            if requests and rng.random() < 0.3:
                prompt = requests[-1].prompt[:40] + got[len(requests) - 1][:9]
            sampling = Sampling(max_tokens=rng.randint(1, 24), temperature=0.0, ignore_eos=True)
            requests.append(Request(prompt, sampling, priority=rng.choice([0, 0, 1]), key=rng.choice("ab")))
            live[engine.submit(requests[-1])] = len(requests) - 1
            got[len(requests) - 1] = []
        if live and rng.random() < 0.05:
            engine.cancel(rng.choice([*live]))
        for event in engine.step():
            if event.token is not None:
                got[live[event.id]].append(event.token)
        audit(engine)
        step += 1
    assert engine.memory.free_rows == engine.memory.rows
    for index, tokens in got.items():
        prompt = requests[index].prompt
        with torch.inference_mode():
            logits_BTC, _ = model.logits(torch.tensor([[*prompt, *tokens]]))
        assert tokens == logits_BTC[0].argmax(-1)[len(prompt) - 1 : -1].tolist()


def test_what_two_rows_have_computed_is_kept_once():
    """The same completion again and again: rows take what the cache has for what they computed themselves."""
    engine = Engine(models.build("gqa"), max_rows=2, max_len=64, page=4)
    for _ in range(2):
        for _ in range(2):
            engine.submit(Request([1, 2, 3], Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)))
        used = 0
        while engine.busy:
            engine.step()
            used = max(used, engine.memory.pages - engine.memory.free_pages)
        assert used <= 42 // 4 + 2, "one page of each row that is not full"
