"""A recorded step says what the model says, for rows, pages and drafts of any number."""

from itertools import product

import pytest
import torch

import models
from models import quant
from serve.engine import Engine
from serve.replay import RUNS, filled
from serve.sampler import Sampling
from tests.serve.test_speculative import Prophet

RECORDED = ["gqa", "sliding_window", "hybrid"]


def served(model, after, **options):
    engine = Engine(model, **{"max_rows": 4, "max_len": 96} | options)
    engine.call.replay.after, engine.call.replay.aside = after, False
    return engine


def answers(engine):
    """Requests of different lengths, of which some end while others go on, and more than there are rows."""
    prompts = [[1 + i, 2, 3] + [5 + i] * (3 * i) for i in range(6)]
    samplings = [Sampling(max_tokens=10 + 4 * i, temperature=i % 2, seed=i, ignore_eos=True) for i in range(6)]
    return [result.tokens for result in engine.generate(prompts, samplings)]


def tapes(engine):
    return list(engine.call.replay.tapes.values())


@pytest.mark.parametrize("name", RECORDED)
def test_tokens_are_the_models_own(name):
    torch.manual_seed(0)
    model = models.build(name)
    plain, played = served(model, 10**9), served(model, 1)
    assert answers(played) == answers(plain)
    assert len(tapes(played)) >= 2 and all(tapes(played)) and not tapes(plain)


def test_a_model_whose_path_depends_on_numbers_runs_itself():
    torch.manual_seed(0)
    model = models.build("dual_chunk_attention")
    played = served(model, 1)
    assert answers(played) == answers(served(model, 10**9))
    assert tapes(played) and not any(tapes(played))


@pytest.mark.parametrize("name, weights", [("gqa", ""), ("hybrid", "int4"), ("moe", "")])
def test_prompts_of_any_length_are_played_as_the_model_computes_them(name, weights):
    """Alone and in company, in chunks and whole, with a past and without. A kernel of moe looks at numbers."""
    torch.manual_seed(0)
    model = models.build(name, vocab=64)
    if weights:
        model = quant.pack(model, weights)
    options = {"chunk": 100, "max_len": 300, "prefix_cache": False}  # which would cut prompts at its blocks
    plain, played = (served(model, after, **options) for after in (10**9, 1))
    sampling = Sampling(max_tokens=3, temperature=0, ignore_eos=True, logprobs=2)
    prompts = [[1 + i % 60, *range(2, 50), *range(1, 61)] * 3 for i in range(22)]
    prompts = [prompt[:length] for prompt, length in zip(prompts, (1, 2, 7, 9, 12, 16, 33, 100, 128, 129, 250) * 2)]
    for group in [*([prompt] for prompt in prompts[:11]), prompts[10:14], prompts[14:]]:
        want, found = (engine.generate(group, sampling) for engine in (plain, played))
        assert [one.tokens for one in found] == [one.tokens for one in want]
        for one, other in zip(want, found):
            for a, b in zip(one.logprobs, other.logprobs):
                assert dict(b.top) == pytest.approx(dict(a.top), abs=2e-2 if weights else 1e-4)
    kinds = played.call.replay.tapes
    prompted = {tokens: tape for (tokens, alone, _, keep, chain), tape in kinds.items() if tokens > 1}
    assert prompted.keys() == set(RUNS) and all(prompted.values())


def test_a_prompt_is_padded_as_far_as_it_pays():
    assert [filled(tokens, 1) for tokens in (2, 8, 9, 64, 65, 128, 129)] == [8, 8, 16, 64, 128, 128, 129]
    assert [filled(tokens, 8) for tokens in (2, 8, 9, 32, 33, 56)] == [8, 8, 16, 32, 33, 64]


def test_drafts_are_played_too():
    """Chains of guesses, of which some are wrong: what is kept of a recorded call is what is kept of the model's."""
    torch.manual_seed(0)
    model, prompts = models.build("hybrid"), [[7, 8, 9], [5, 6, 7, 8]]
    sampling = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
    plain = [result.tokens for result in served(model, 10**9).generate(prompts, sampling)]
    prophet = Prophet({tuple(prompt): tokens for prompt, tokens in zip(prompts, plain)}, widest=2)
    played = served(model, 1, drafter=prophet)
    played.speculation.width.choose = lambda rates, ready: prophet.widest
    assert [result.tokens for result in played.generate(prompts, sampling)] == plain
    kinds = played.call.replay.tapes
    drafted = [tape for (_, _, whole, keep, _), tape in kinds.items() if keep and whole]
    assert drafted and all(drafted)  # rows of different lengths are padded, which this model's kernels look at
    assert prophet.proposed > played.speculation.accepted > 0


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_packed_weights_are_played_and_do_not_depend_on_the_batch(weights):
    """Each request alone, step by step, and in a batch: the same tokens, bit-equal logits behind them."""
    torch.manual_seed(0)
    model = quant.pack(models.build("gqa", vocab=64), weights)
    together = answers(served(model, 1))
    prompts = [[1 + i, 2, 3] + [5 + i] * (3 * i) for i in range(6)]
    for i in (1, 4):
        sampling = Sampling(max_tokens=10 + 4 * i, temperature=i % 2, seed=i, ignore_eos=True)
        assert served(model, 1).generate([prompts[i]], sampling)[0].tokens == together[i], i


def test_calls_go_on_while_one_is_recorded():
    torch.manual_seed(0)
    model = models.build("hybrid")
    engine = served(model, 2)
    engine.call.replay.aside = True
    assert answers(engine) == answers(served(model, 10**9))
    assert all(tapes(engine)) and len(tapes(engine)) >= 2
    assert answers(engine) == answers(served(model, 10**9))


def test_an_engine_that_is_warm_has_its_tapes():
    torch.manual_seed(0)
    engine = Engine(models.build("gqa"), max_rows=4, max_len=96)
    engine.warm()
    kinds = {key[:2]: bool(tape) for key, tape in engine.call.replay.tapes.items()}
    assert kinds == dict.fromkeys(product((1, *RUNS), (True, False)), True)
    assert not engine.busy and engine.memory.free_rows == engine.memory.rows
