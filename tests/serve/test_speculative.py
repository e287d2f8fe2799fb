"""Speculation: drafts change how many tokens a call gives, and never which."""

import random
from copy import deepcopy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import models
from serve.drafters.draft import DraftModel
from serve.drafters.ngram import NGram
from serve.engine import Engine
from serve.sampler import Sampling
from serve.speculative import Draft
from serve.width import PROBE, Chains, Rate, Width

PROMPTS = [[1, 2, 3, 4] * 6, [5, 6, 7] * 5, [9], list(range(20))]
STATES = ["gqa", "gated_deltanet", "sliding_window", "nsa", "mla", "mamba_ssd", "rwkv7", "engram", "hybrid"]


class Prophet(Chains):
    """Knows the completions and tells them with errors, in drafts of any width, or none."""

    reads = False

    def __init__(self, completions, seed=0, widest=7, right=0.8):
        self.completions, self.widest, self.right = completions, widest, right
        self.random, self.proposed = random.Random(seed), 0

    def propose(self, sequences, width):
        return [self.draft(sequence) for sequence in sequences]

    def draft(self, sequence):
        rest = self.completions[tuple(sequence.tokens[: sequence.prompt])][sequence.generated :]
        rest = rest[: self.random.randrange(self.widest + 1)]
        tokens = [token if self.random.random() < self.right else self.random.randrange(64) for token in rest]
        self.proposed += len(tokens)
        return Draft.chain(tokens) if tokens else None

    def forget(self, sequence):
        pass


def engine(model, drafter=None, **options):
    made = Engine(model, **{"max_rows": 4, "max_len": 128, **options}, drafter=drafter)
    if drafter is not None:
        made.speculation.width.choose = lambda rates, ready: drafter.widest  # always, whether it pays or not
    return made


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", STATES)
def test_tokens_are_those_of_plain_decoding(name, temperature):
    torch.manual_seed(1)
    model = models.build(name)
    sampling = Sampling(max_tokens=40, temperature=temperature, seed=7, ignore_eos=True)
    plain = engine(model).generate(PROMPTS, sampling)
    prophet = Prophet({tuple(prompt): result.tokens for prompt, result in zip(PROMPTS, plain)})
    for drafter in (prophet, NGram(shortest=1), DraftModel(model, 4, 128)):
        drafted = engine(model, drafter)
        assert [r.tokens for r in drafted.generate(PROMPTS, sampling)] == [r.tokens for r in plain]
        assert drafted.speculation.accepted > 0 or isinstance(drafter, NGram)
        assert drafted.memory.free_rows == drafted.memory.rows
    assert prophet.proposed > drafted.speculation.accepted > 0


def test_a_draft_of_its_own_model_is_always_right_also_at_temperature():
    torch.manual_seed(1)
    model = models.build("gqa")
    drafted = engine(model, DraftModel(model, 4, 128))
    drafted.generate(PROMPTS, Sampling(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True))
    assert drafted.speculation.accepted == drafted.speculation.drafted > 100


@pytest.mark.parametrize("name", ["gqa", "sliding_window", "gated_deltanet"])
def test_guesses_are_the_draft_models_own_whatever_became_of_those_before(name):
    torch.manual_seed(1)
    model = models.build(name)
    small = deepcopy(model)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    drafter, said, usual = DraftModel(small, 4, 128), [], []
    propose = drafter.propose

    def noted(sequences, width):
        width = 1 + len(said) % 7
        drafts = propose(sequences, width)
        said.extend((list(row.tokens), draft.tokens) for row, draft in zip(sequences, drafts) if draft)
        usual.append(drafter.usual)
        return drafts

    drafter.propose = noted
    sampling = [Sampling(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (30, 9, 25, 14)]
    found = engine(model, drafter)
    found.generate(PROMPTS, sampling)
    assert 0 < found.speculation.accepted < found.speculation.drafted
    assert usual.count(False) == 1  # the prompts are read; a row that ends does not make the others read theirs again
    alone = engine(small)
    for tokens, guesses in said[::5]:
        [own] = alone.generate([tokens], Sampling(max_tokens=len(guesses), temperature=0.0, ignore_eos=True))
        assert own.tokens == list(guesses)


def test_a_draft_model_guesses_up_to_the_last_token_that_fits():
    torch.manual_seed(1)
    model = models.build("gqa")
    sampling = [Sampling(max_tokens=32 - len(prompt), temperature=0, ignore_eos=True) for prompt in PROMPTS]
    plain = engine(model, max_len=32).generate(PROMPTS, sampling)
    drafted = engine(model, DraftModel(model, 4, 32), max_len=32)
    assert [r.tokens for r in drafted.generate(PROMPTS, sampling)] == [r.tokens for r in plain]
    assert drafted.speculation.accepted == drafted.speculation.drafted > 0


def test_a_draft_model_with_fewer_rows_drafts_for_some():
    torch.manual_seed(1)
    model = models.build("gated_deltanet")
    sampling = Sampling(max_tokens=40, temperature=0, ignore_eos=True)
    drafted = Engine(model, max_rows=4, max_len=128, drafter=DraftModel(model, 2, 128))
    drafted.warm()
    assert [r.tokens for r in drafted.generate(PROMPTS, sampling)] == [
        r.tokens for r in engine(model).generate(PROMPTS, sampling)
    ]
    assert drafted.speculation.ready(4, lambda tokens: True)


def test_logprobs_penalties_and_stops_are_those_of_plain_decoding():
    torch.manual_seed(1)
    model = models.build("gqa")
    sampling = Sampling(
        max_tokens=40, temperature=0.5, seed=7, frequency_penalty=0.7, presence_penalty=0.4, logprobs=2, ignore_eos=True
    )
    plain = engine(model).generate(PROMPTS, sampling)
    prophet = Prophet({tuple(prompt): result.tokens for prompt, result in zip(PROMPTS, plain)}, right=0.9)
    drafted = engine(model, prophet).generate(PROMPTS, sampling)
    assert [r.tokens for r in drafted] == [r.tokens for r in plain]
    for ours, theirs in zip(drafted, plain):
        assert [told.token for told in ours.logprobs] == pytest.approx(
            [told.token for told in theirs.logprobs], abs=1e-4
        )


def test_rows_preempted_and_ended_while_drafting():
    torch.manual_seed(1)
    model = models.build("gqa")
    sampling = [Sampling(max_tokens=n, temperature=0.8, seed=n, ignore_eos=True) for n in (40, 3, 1, 25, 40, 9)]
    prompts = [*PROMPTS, [3, 1] * 8, [8]]
    plain = engine(model).generate(prompts, sampling)
    completions = {tuple(prompt): result.tokens for prompt, result in zip(prompts, plain)}
    page = 2 * 2 * 16 * 4 * 16 * 2
    short = engine(model, Prophet(completions, right=0.95), memory_bytes=9 * page)
    assert [r.tokens for r in short.generate(prompts, sampling)] == [r.tokens for r in plain]


def test_the_distribution_of_drawn_tokens():
    """Against exact probabilities, over many seeds: what drafts say must not pull the draws towards it."""
    torch.manual_seed(0)
    model = models.build("gated_deltanet", vocab=4, dim=32).eval()
    prompt, draws = [1, 2, 3], 4000
    expected_CCC = torch.zeros(4, 4, 4, dtype=torch.float64)
    with torch.inference_mode():
        for a, b in product(range(4), repeat=2):
            log_TC = model.logits(torch.tensor([[*prompt, a, b]]))[0][0, 2:].double().log_softmax(-1)
            expected_CCC[a, b] = (log_TC[0, a] + log_TC[1, b] + log_TC[2]).exp() * draws
    always = Prophet({tuple(prompt): [2, 2, 2]}, right=1.0, widest=2)
    drafted = engine(model, always, max_rows=32)
    counts_CCC = torch.zeros_like(expected_CCC)
    samplings = [Sampling(max_tokens=3, seed=seed, ignore_eos=True) for seed in range(draws)]
    for result in drafted.generate([prompt] * draws, samplings):
        counts_CCC[tuple(result.tokens)] += 1
    assert drafted.speculation.accepted > 100 and drafted.speculation.drafted > 2 * drafted.speculation.accepted
    assert chisquare(counts_CCC.flatten().numpy(), expected_CCC.flatten().numpy(), sum_check=False).pvalue > 1e-3


# -- drafts ------------------------------------------------------------------------------------------------------


def test_a_tree_is_followed_from_its_root():
    #       5 - 6        drawn after the last token: 5, after 5: 7, after 7: 9
    #      /  \ 7 - 8
    #     4
    tree = Draft([5, 4, 6, 7, 8], [-1, -1, 0, 0, 3])
    assert tree.depths() == [1, 1, 2, 2, 3]
    assert tree.ancestry(4) == [5, 7, 8]
    assert tree.branches and not Draft.chain([5, 6]).branches
    assert tree.follow([5, 7, 0, 0, 9, 0]) == [0, 3]
    assert tree.follow([4, 0, 5, 0, 0, 0]) == [1]
    assert tree.follow([3, 5, 5, 5, 5, 5]) == []
    assert tree.cut(2) == Draft([5, 4, 6, 7], [-1, -1, 0, 0])
    assert tree.cut(3) is tree and tree.cut(0) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 10))
def test_lookup_finds_the_latest_place_of_the_longest_run(tokens, width, steps):
    class Row:
        id = 0

    drafter, row = NGram(longest=3, shortest=1), Row()
    for end in range(max(1, len(tokens) - steps), len(tokens) + 1):  # its index grows with the sequence
        row.tokens = tokens[:end]
        [draft] = drafter.propose([row], width)
    expected = None
    for size in (3, 2, 1):
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
        if size <= len(tokens) and ends:
            expected = (tokens[ends[-1] :] * width)[:width]
            break
    assert (None if draft is None else list(draft.tokens)) == expected


# -- width -------------------------------------------------------------------------------------------------------


def simulate(rate, cost, calls=4000, rows=1, widest=8, believed=None):
    """Tokens per second of the policy over that of plain decoding, with drafts right at `rate` and calls of `cost`.

    believed: a rate that is taken for true whatever comes.
    """
    draw, width, estimate = random.Random(0), Width(widest), Rate()
    tokens = seconds = 0.0
    for _ in range(calls):
        steps = width.choose([estimate] * rows)
        accepted = 0
        while accepted < steps and draw.random() < rate:
            accepted += 1
        if steps:
            estimate.add(accepted, steps)
            estimate.value = estimate.value if believed is None else believed
        took = cost(rows * (1 + steps))
        width.add(rows, 1 + steps, took, rows * accepted)
        tokens, seconds = tokens + rows * (1 + accepted), seconds + took
    return tokens / seconds * cost(rows) / rows, steps


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_width_never_costs_more_than_it_can_bring(rows):
    flat, steep = (lambda n: 1.0 + 0.001 * n), (lambda n: float(n))
    for rate in (0.0, 0.1, 0.5, 0.9, 1.0):
        for cost in (flat, steep, lambda n: max(1.0, n / 16)):
            assert simulate(rate, cost, rows=rows)[0] > 0.98, (rate, rows)
            assert simulate(rate, cost, rows=rows, believed=1.0)[0] > 0.98, (rate, rows)
    assert simulate(0.9, flat, rows=rows)[0] > 3


def told(add, *measured):
    """As often as makes it known."""
    for _ in range(2):
        add(*measured)


def test_width_looks_again_after_a_while():
    width, rate = Width(4), Rate(0.0)
    width.credit = 2.0

    def widths(calls, cost, came=0):
        """Of so many calls that take `cost` when something is drafted, `came` of which is right."""
        chosen = []
        for _ in range(calls):
            chosen.append(width.choose([rate]))
            drafted = chosen[-1] > 0
            width.add(1, 1 + chosen[-1], cost if drafted else 1.0, came * drafted)
        return chosen

    for tokens in (1, 2, 4):
        told(width.add, 1, tokens, 1.1)
    assert widths(4 * PROBE, 1.1).count(1) in (3, 4)
    told(width.calls.add, 2, 6.0)
    width.calls.fade()
    assert widths(4000, 6.0).count(1) in range(5, 15)  # a look that costs more is taken less often
    rate.value = 0.99
    found = widths(2000, 1.1, came=1)  # whatever they were thought to cost
    assert found[-2 * PROBE :].count(0) in (1, 2)


def test_width_waits_for_calls_that_will_be_faster():
    width, rate = Width(15), Rate(0.9)
    told(width.add, 1, 1, 1.0)
    assert width.choose([rate], lambda tokens: False) == 0
    asked = []
    assert width.choose([rate], lambda tokens: asked.append(tokens) or tokens < 4) == 0 and asked[-1] == 16


def test_rows_that_nothing_is_drafted_for_are_not_hoped_for():
    """A wide call of all rows pays while all have good drafts, and not once it is seen that one of eight has."""
    width, rates = Width(3), [Rate(0.9)] * 8
    told(width.add, 8, 1, 1.0)
    for tokens in (2, 4):
        told(width.add, 8, tokens, 1.5)
    assert width.choose(rates)
    for _ in range(30):
        width.covered(1 / 8)
    assert not any(width.choose(rates) for _ in range(PROBE // 2))


def test_drafts_live_on_credit():
    """However good a draft looks, one that could cost more than there is waits until others have saved as much."""
    width, rate = Width(15), Rate(0.99)
    told(width.add, 1, 1, 1.0)
    width.credit = 2.0
    cost = {1: 1.5, 3: 2.5, 7: 4.0, 15: 4.8}
    for guesses, seconds in cost.items():
        told(width.add, 1, 1 + guesses, seconds)

    def chosen(calls, right):
        """The next widths, of drafts that are right or wrong."""
        found = []
        for _ in range(calls):
            found.append(width.choose([rate]))
            width.add(1, 1 + found[-1], cost.get(found[-1], 1.0), came=found[-1] * right)
        return found

    assert chosen(3, right=True) == [3, 7, 15]
    wrong = chosen(12, right=False)
    assert wrong[0] == 15 and wrong[-4:] == [0] * 4 and width.credit >= 0
