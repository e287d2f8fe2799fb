"""A recorded step says what the model says, for rows, pages and drafts of any number."""

import pytest
import torch

import models
from models import quant
from serve.engine import Engine
from serve.sampler import Sampling
from tests.serve.test_speculative import Prophet

RECORDED = ["gqa", "sliding_window", "hybrid"]


def served(model, after, **options):
    engine = Engine(model, max_rows=4, max_len=96, **options)
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
    model = models.build("moe")
    played = served(model, 1)
    assert answers(played) == answers(served(model, 10**9))
    assert tapes(played) and not any(tapes(played))


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
    assert {alone: bool(tape) for (tokens, alone, *_), tape in engine.call.replay.tapes.items() if tokens == 1} == {
        True: True,
        False: True,
    }
    assert not engine.busy and engine.memory.free_rows == engine.memory.rows
