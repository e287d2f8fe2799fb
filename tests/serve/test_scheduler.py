"""Whose turn it is, who gives way, and how much of a step goes to prompts."""

import pytest
import torch

import models
import serve.engine
from serve.engine import Engine
from serve.pace import FIRST, LEAST, LONGEST, MOST, SLACK, Pace
from serve.request import Request
from serve.sampler import Sampling
from serve.scheduler import _PATIENCE


@pytest.fixture(scope="module", params=["gqa", "gated_deltanet"])
def model(request):
    torch.manual_seed(0)
    return models.build(request.param, vocab=64, dim=32)


def greedy(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def ended(engine, steps=1000) -> list[int]:
    """Requests in the order they end."""
    order = []
    while engine.busy and steps:
        order += [event.id for event in engine.step() if event.reason is not None]
        steps -= 1
    return order


def test_better_priority_starts_first_and_takes_rows(model):
    engine = Engine(model, max_rows=2, max_len=64)
    low = [engine.submit(Request([n + 1] * 20, greedy(30), priority=1)) for n in range(4)]
    alone = [result.tokens for result in Engine(model, max_rows=4, max_len=64).generate([[1] * 20] * 2, greedy(30))]
    got = {low[0]: [], low[1]: []}
    for _ in range(5):
        for event in engine.step():
            got[event.id].append(event.token)
    high = [engine.submit(Request([9], greedy(3), priority=0)) for _ in range(3)]
    order = []
    while engine.busy:
        for event in engine.step():
            got.setdefault(event.id, []).append(event.token)
            order += [event.id] if event.reason else []
    assert order == [*high, *low] and engine.scheduler.preemptions == 2
    assert got[low[0]] == alone[0]


def test_equal_priority_never_takes_a_row(model):
    engine = Engine(model, max_rows=1, max_len=64)
    ids = [engine.submit(Request([1], greedy(5), priority=0)) for _ in range(3)]
    assert ended(engine) == ids and engine.scheduler.preemptions == 0


def test_keys_get_equal_shares(model):
    """One key asks for ten completions at once, another for one after the other."""
    engine = Engine(model, max_rows=1, max_len=64)
    many = {engine.submit(Request([1] * 4, greedy(5), key="many")) for _ in range(10)}
    engine.step()
    few = [engine.submit(Request([1] * 4, greedy(5), key="few"))]
    order = []
    while engine.busy:
        for event in engine.step():
            if event.reason is None:
                continue
            order.append(event.id)
            if event.id in few and len(few) < 5:
                few.append(engine.submit(Request([1] * 4, greedy(5), key="few")))
    whose = ["many" if id in many else "few" for id in order]
    assert whose[:9] == ["many", "few"] * 4 + ["many"]


def test_keys_that_are_away_are_forgotten_once_they_would_come_back_even(model):
    engine = Engine(model, max_rows=2, max_len=64)
    engine.submit(Request([1] * 30, greedy(20), key="debtor"))
    for _ in range(3):
        engine.step()
    stays = engine.submit(Request([1], greedy(60), key="stays"))
    engine.cancel(0)
    most = 0
    for place in range(40):
        engine.submit(Request([1], greedy(1), key=f"guest {place}"))
        engine.step()
        most = max(most, len(engine.scheduler._served))
    assert stays in engine._live and most < 5 and "debtor" not in engine.scheduler._served
    engine.cancel(stays)
    ended(engine)
    engine.submit(Request([1], greedy(1), key="last"))
    assert [*engine.scheduler._served] == ["last"]


@pytest.mark.parametrize("first, second", [({"priority": 1}, {"priority": 0}), ({"key": "a"}, {"key": "b"})])
def test_a_long_prompt_holds_up_nobody_who_goes_before_it(model, first, second):
    """Neither a better priority nor a key that was served less; and it is computed for all that."""
    engine = Engine(model, max_rows=8, max_len=1024, chunk=16, prefix_cache=False)
    long = engine.submit(Request([1] * 900, greedy(2), **first))
    for _ in range(3):
        engine.step()
    short = engine.submit(Request([2] * 20, greedy(1), **second))
    assert [event.id for _ in range(5) for event in engine.step()] == [short]
    places = 0
    while long in engine._live:
        engine.submit(Request([3] * 15, greedy(1), **second))  # they never stop coming
        engine.step()
        places += 1
        assert places < 300


def test_nobody_starves(model):
    """Better priority and a less served key never stop coming; the first request still gets its row."""
    engine = Engine(model, max_rows=1, max_len=64)
    engine.submit(Request([1], greedy(1), priority=0, key="b"))
    poor = engine.submit(Request([1], greedy(4), priority=9, key="a"))
    order = []
    while poor not in order:
        engine.submit(Request([1], greedy(1), priority=0, key=f"b{len(order)}"))
        order += [event.id for event in engine.step() if event.reason]
        assert len(order) <= _PATIENCE + 2
    assert len(order) > _PATIENCE // 2


@pytest.mark.parametrize("preempt", ["recompute", "offload"])
def test_preemption_changes_no_token(model, preempt):
    """Of sampled streams, thrown out again and again; what is kept outside is not computed again."""
    sampling = [Sampling(max_tokens=30, temperature=0.9, seed=n, ignore_eos=True) for n in range(4)]
    prompts = [[n + 1] * 10 for n in range(4)]
    plain = [result.tokens for result in Engine(model, max_rows=4, max_len=64).generate(prompts, sampling)]
    engine = Engine(model, max_rows=2, max_len=64, preempt=preempt, prefix_cache=False)
    ids = [engine.submit(Request(p, s, priority=9)) for p, s in zip(prompts, sampling)]
    tokens, step = {id: [] for id in ids}, 0
    while engine.busy:
        if step % 5 == 3:
            engine.submit(Request([5], greedy(1)))
        for event in engine.step():
            if event.id in tokens:
                tokens[event.id].append(event.token)
        step += 1
    assert [*tokens.values()] == plain and engine.scheduler.preemptions > 5
    served = engine.scheduler._served[""] - (step + 1) // 5
    known = sum(len(p) + 30 - 1 for p in prompts)
    assert served == known if preempt == "offload" else served > known + 100


def test_what_was_kept_outside_comes_back_where_the_cache_holds_its_pages(model):
    """All the pages there are belong to one row, and the cache has kept its beginning: both do not fit."""
    engine = Engine(model, max_rows=1, max_len=20, page=4, preempt="offload")
    low = engine.submit(Request([*range(13)], greedy(7), priority=1))
    for _ in range(2):
        engine.step()
    high = engine.submit(Request([7], greedy(1), priority=0))
    assert ended(engine, steps=40) == [high, low] and engine.scheduler.preemptions > 0


def test_deadlines_end_requests_wherever_they_are(model, monkeypatch):
    now = 0.0
    monkeypatch.setattr(serve.engine, "monotonic", lambda: now)
    engine = Engine(model, max_rows=1, max_len=64)
    runs = engine.submit(Request([1], greedy(50), deadline=5.0))
    waits = engine.submit(Request([1], greedy(50), deadline=3.0))
    free = engine.submit(Request([1], greedy(2)))
    for _ in range(4):
        assert [(event.id, event.reason) for event in engine.step()] == [(runs, None)]
    now = 3.5
    assert [(event.id, event.reason) for event in engine.step()] == [(waits, "deadline"), (runs, None)]
    now = 5.0
    assert [(event.id, event.reason) for event in engine.step()] == [(runs, "deadline"), (free, None)]
    assert ended(engine) == [free] and engine.memory.free_rows == 1 and engine.scheduler.waiting == []


def test_what_is_being_computed_is_waited_for(model):
    """Many requests with one long prompt, all at once: it is computed once."""
    engine = Engine(model, max_rows=8, max_len=256, chunk=32)
    prompt = [(7 * n) % 61 for n in range(100)]
    ids = [engine.submit(Request(prompt, greedy(4))) for _ in range(8)]
    other = engine.submit(Request([5] * 100, greedy(4)))
    cached, tokens = {}, {id: [] for id in [*ids, other]}
    while engine.busy:
        for event in engine.step():
            cached.setdefault(event.id, event.cached)
            tokens[event.id].append(event.token)
    assert [cached[id] for id in ids] == [0] + [96] * 7 and cached[other] == 0
    assert all(tokens[id] == tokens[ids[0]] for id in ids)
    assert engine.stats()["prefix_hits"] == 7 * 96 and engine.stats()["prefix_queries"] == 9 * 100


def test_isolated_keys_share_nothing(model):
    prompt = [(7 * n) % 61 for n in range(40)]
    for isolated in (False, True):
        engine = Engine(model, max_rows=2, max_len=64, isolated=isolated)
        cached = []
        for key in ("a", "b", "a"):
            engine.submit(Request(prompt, greedy(2), key=key))
            cached.append(engine.step()[0].cached)
            ended(engine)
        assert cached == ([0, 0, 32] if isolated else [0, 32, 32])


def test_a_step_with_prompts_takes_no_longer_than_streams_bear():
    pace = Pace(chunk=3000)
    assert pace.room(0, 1) == pace.room(4, 32) == FIRST  # nothing is known yet
    for tokens in [100, 50, 200] * 20:
        pace.computed(tokens, 0.010 + 0.0001 * tokens)
    pace.generated(1, 0.008)
    pace.generated(32, 0.035)
    assert pace.room(0, 32) == pytest.approx((LONGEST - 0.010) / 0.0001, abs=1)
    assert pace.room(32, 32) == pytest.approx(((SLACK - 1) * 35 - 10) / 0.1, abs=1)
    assert pace.room(1, 32) == pytest.approx((SLACK * 35 - 8 - 10) / 0.1, abs=1)  # others are wanted, so 35 is usual
    for _ in range(1000):  # prompts never stop coming: now steps are longer
        pace.room(32, 32)
        pace.stepped(1.0)
    assert pace.room(32, 32) == pytest.approx((SLACK * MOST * 35 - 35 - 10) / 0.1, abs=1)
    for _ in range(1000):
        pace.stepped(0.035)
    assert pace.room(32, 32) == pytest.approx(((SLACK - 1) * 35 - 10) / 0.1, abs=10)
    for _ in range(1000):
        pace.generated(32, 0.015)
        pace.stepped(0.015)
    assert pace.room(32, 32) == LEAST
    for _ in range(100):
        pace.generated(32, 0.035)
    before = pace.room(32, 32)
    pace.computed(100, 9.0)  # something else ran on this machine
    assert before / 2 < pace.room(32, 32) < before
    for _ in range(100):
        pace.computed(100, 0.0005)
    assert pace.room(32, 32) == 3000
    with pytest.raises(ValueError, match="^chunk=0: must be at least 1 token$"):
        Pace(0)


def test_a_slow_first_call_does_not_linger():
    """It was compiled, recorded or disturbed: what streams bear is told by those that came after it."""
    slow, plain = Pace(chunk=3000), Pace(chunk=3000)
    for pace in (slow, plain):
        pace.computed(100, 0.020)
        pace.generated(32, 0.6 if pace is slow else 0.035)
        pace.room(32, 32)
        pace.stepped(0.6 if pace is slow else 0.035)
        for _ in range(3):
            pace.generated(32, 0.035)
            pace.room(32, 32)
            pace.stepped(0.035)
    assert slow.room(32, 32) <= plain.room(32, 32)


def test_steps_before_a_prompt_was_timed_say_nothing_of_what_is_usual():
    """As where all of each prompt but its last token comes from the prefix cache."""
    late, fresh = Pace(chunk=3000), Pace(chunk=3000)
    for pace, steps in ((late, 300), (fresh, 0)):
        for _ in range(300):
            pace.generated(32, 0.035)
        for _ in range(steps):
            pace.room(32, 32)
            pace.stepped(0.035)
        pace.computed(100, 0.020)
    assert late.room(32, 32) == fresh.room(32, 32)


def test_no_prompt_is_begun_for_a_few_tokens(model):
    """Beside whole prompts a step has room for a piece of another one only where it is worth a call."""
    engine = Engine(model, max_rows=4, max_len=128, prefix_cache=False)
    for seed in range(3):
        engine.submit(Request([seed + 1] * 40, greedy(2)))
    parts, own = [], engine.scheduler._parts
    engine.scheduler._parts = lambda sequences: parts.append([tokens for _, tokens in own(sequences)]) or []
    for room, want in ((60, [40]), (LEAST + 40, [40, LEAST]), (85, [40, 40]), (20, [20])):
        engine.pace.room = lambda decoding, live, room=room: room
        engine.scheduler.plan()
        assert parts[-1] == want


@pytest.mark.parametrize("paced", [True, False])
def test_streams_do_not_stutter_when_prompts_come(paced, monkeypatch):
    """On a machine whose calls take 6 ms, and 0.7 ms for a generated token or 0.3 ms for one of a prompt."""
    now = 0.0
    monkeypatch.setattr(serve.engine, "perf_counter", lambda: now)
    torch.manual_seed(0)
    engine = Engine(models.build("gqa", vocab=64, dim=16, layers=1), max_rows=16, max_len=300, prefix_cache=False)
    if not paced:
        monkeypatch.setattr(engine.pace, "room", lambda decoding, live: engine.pace.chunk)
    own = engine.call

    def call(parts):
        nonlocal now
        tokens = sum(part.tokens for part in parts)
        now += 0.006 + tokens * (0.0007 if tokens == len(parts) else 0.0003)
        return own(parts)

    monkeypatch.setattr(engine, "call", call)
    last, gaps, count, done = {}, [], 0, 0
    while done < 32:
        while count < 32 and count - done < 16:
            engine.submit(Request([count] * 200, greedy(30 + 11 * count % 30)))
            count += 1
        for event in engine.step():
            if event.id in last:
                gaps.append(now - last[event.id])
            last[event.id] = now
            done += event.reason is not None
    gaps.sort()
    slowest, usual = gaps[len(gaps) * 99 // 100], gaps[len(gaps) // 2]
    assert slowest < 2 * usual if paced else slowest > 3 * usual
