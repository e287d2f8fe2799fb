"""batch_invariant: a request is told the same bits alone, in company, after a preemption and on another engine."""

import pytest
import torch

import models
from models import quant
from serve.drafters.ngram import NGram
from serve.engine import Engine
from serve.request import Request
from serve.sampler import Sampling
from tests.serve.test_architectures import names

TOKENS = 10
BEGINNING = [(7 * i * i + 3) % 50 for i in range(140)]
PROMPTS = [BEGINNING[:70], [5], BEGINNING[:131] + [1, 2], BEGINNING[:64], BEGINNING[20:60]]


def sampling(seed):
    return Sampling(max_tokens=TOKENS, temperature=0.8, seed=seed, logprobs=2, ignore_eos=True)


def engine(model, rows=4, **options):
    return Engine(model, max_rows=rows, max_len=160, batch_invariant=True, **options)


def run(engine, requests, later=()):
    """Of each request its tokens with all they were told with, and how many of its prompt's were found in the cache.

    later: requests that come when the others have generated a little.
    """
    ids = [engine.submit(request) for request in requests]
    told, cached = {id: [] for id in ids}, dict.fromkeys(ids, 0)
    while engine.busy:
        for event in engine.step():
            cached[event.id] += event.cached
            if event.token is not None:
                told[event.id].append((event.token, event.logprobs))
        if later and all(len(told[id]) >= TOKENS // 2 for id in ids):
            ids += (new := [engine.submit(request) for request in later])
            told, cached, later = told | {id: [] for id in new}, cached | dict.fromkeys(new, 0), ()
    return [told[id] for id in ids], [cached[id] for id in ids]


def alone(model, **options):
    """Each request on an engine of its own."""
    requests = [Request(prompt, sampling(seed)) for seed, prompt in enumerate(PROMPTS)]
    return [run(engine(model, **options), [request])[0][0] for request in requests]


@pytest.mark.parametrize("name", names())
def test_bits_depend_on_the_request_alone(name):
    torch.manual_seed(0)
    model = models.build(name).eval()
    expected = alone(model, prefix_cache=False)
    requests = [Request(prompt, sampling(seed)) for seed, prompt in enumerate(PROMPTS)]
    crowded = engine(model, chunk=64)
    assert run(crowded, requests)[0] == expected
    again, cached = run(crowded, requests[::-1])  # now from the cache, in other company
    assert again[::-1] == expected and sum(cached) > 0
    parted = [3, 0, 7, 5, 9]
    resumed = [
        Request(prompt, sampling(seed), resumed=[token for token, _ in expected[seed][:known]])
        for seed, (prompt, known) in enumerate(zip(PROMPTS, parted))
    ]
    found, _ = run(engine(model, chunk=64), resumed)
    assert found == [told[known:] for told, known in zip(expected, parted)]


@pytest.mark.parametrize("name", ["gqa", "gated_deltanet", "mla", "nsa"])
@pytest.mark.parametrize("dtype, weights", [("bf16", "bf16"), ("fp32", "int8")])
def test_bits_hold_with_packed_weights_recorded_steps_and_preemptions(name, dtype, weights):
    torch.manual_seed(0)
    model = quant.held(models.build(name).eval(), dtype, weights)
    expected = alone(model, prefix_cache=False)
    for preempt in ("recompute", "offload"):
        tight = engine(model, rows=2, preempt=preempt)
        tight.call.replay.after, tight.call.replay.aside = 1, False
        first, *later = [Request(prompt, sampling(seed), priority=-seed) for seed, prompt in enumerate(PROMPTS)]
        assert run(tight, [first], later)[0] == expected
        assert tight.scheduler.preemptions > 0 and any(tight.call.replay.tapes.values())


def test_drafts_are_refused():
    with pytest.raises(ValueError, match="batch_invariant"):
        engine(models.build("gqa"), drafter=NGram())
