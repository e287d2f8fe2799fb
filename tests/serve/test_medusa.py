"""Drafts of a model's own heads: trees of Medusa, chains of MTP; more tokens of a call, and always those of none."""

import pytest
import torch

import models
from models.state import bytes_per_token
from serve.drafters.medusa import SIZES, MedusaHeads
from serve.drafters.mtp import MTPHeads
from serve.engine import Engine
from serve.sampler import Sampling
from serve.width import Rate, Width
from tests.serve.test_speculative import told

PATTERNS = ["gqa", "gqa(window=6)", "gated_deltanet gqa", "nsa"]
ROWS = {"max_rows": 4, "max_len": 128}


@pytest.fixture(scope="module")
def trained():
    """A decoder that has learnt texts that repeat themselves, its heads too."""
    made = {}

    def trained(head, pattern="gqa", steps=100):
        if (head, pattern) not in made:
            torch.manual_seed(0)
            model = models.build("decoder", head=head, pattern=pattern, dim=48, vocab=32, layers=1).train()
            optimizer = torch.optim.Adam(model.parameters(), 5e-3)
            for step in range(steps):
                total, _ = model(model.example(12, step))
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
            made[head, pattern] = model.eval()
        return made[head, pattern]

    return trained


@pytest.fixture(scope="module")
def prompts(trained):
    ids = trained("medusa(heads=3)").example(4, 1000)["ids_BT"]
    return [ids[row, : 32 - 5 * row].tolist() for row in range(4)]


def engine(model, drafter=None, width=None, **options):
    made = Engine(model, **ROWS | options, drafter=drafter)
    if width is not None:
        made.speculation.width.choose = lambda rates, ready: width  # always, whether it pays or not
    return made


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_tree_changes_no_token_and_gives_more_of_a_call(trained, prompts, pattern, temperature):
    model = trained("medusa(heads=3)", pattern, 100 if pattern == "gqa" else 10)
    sampling = [Sampling(max_tokens=n, temperature=temperature, seed=n, ignore_eos=True) for n in (40, 33, 1, 24)]
    plain = engine(model).generate(prompts, sampling)
    for width in (3, 5):
        drafted = engine(model, MedusaHeads(model), width)
        assert [r.tokens for r in drafted.generate(prompts, sampling)] == [r.tokens for r in plain]
        found = drafted.speculation
        assert found.drafted > 2 * found.drafts > 0, "no draft had branches"
        if pattern == "gqa" and not temperature:
            assert found.accepted > 1.2 * found.drafts


def test_branches_are_accepted_that_a_chain_has_not(trained, prompts):
    """Of as many heads, a tree gives more tokens of a call than the chain of each one's best guess."""
    model = trained("medusa(heads=3)")
    sampling = Sampling(max_tokens=60, temperature=0.9, seed=5, ignore_eos=True)
    accepted = []
    for width in (2, 4):  # trees of 3 and of 15 tokens; with one head's guess a level, 3 are the chain
        drafter = MedusaHeads(model)
        if width == 2:
            drafter._nodes, drafter._parents = [(0, 0), (1, 0), (2, 0)], [-1, 0, 1]
            drafter._grow = lambda: None
        made = engine(model, drafter, width)
        made.generate(prompts, sampling)
        accepted.append(made.speculation.accepted / made.speculation.drafts)
    assert accepted[1] > 1.1 * accepted[0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("head", ["mtp(depth=2)", "mtp(depth=2,form=independent)", "mtp(pattern=gated_deltanet)"])
def test_mtp_changes_no_token_and_gives_more_of_a_call(trained, prompts, head, temperature):
    model = trained(head)
    sampling = [Sampling(max_tokens=n, temperature=temperature, seed=n, ignore_eos=True) for n in (40, 33, 2, 24)]
    plain = engine(model).generate(prompts, sampling)
    drafter = MTPHeads(model, **ROWS)
    drafted = engine(model, drafter, drafter.widest)
    assert [r.tokens for r in drafted.generate(prompts, sampling)] == [r.tokens for r in plain]
    assert drafted.speculation.accepted > 0.2 * drafted.speculation.drafted > 0
    assert drafter.memory.free_rows == drafter.memory.rows


def test_mtp_follows_rows_that_begin_anew(trained, prompts):
    """Rows that lost their memory and those whose beginning others have computed are drafted for, too."""
    model = trained("mtp(depth=2)")
    sampling = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)
    plain = engine(model).generate(prompts, sampling)
    drafter = MTPHeads(model, **ROWS)
    pages = 11 * 16 * int(bytes_per_token(model.state_spec(1)))
    made = engine(model, drafter, 2, memory_bytes=pages)
    for _ in range(2):
        assert [r.tokens for r in made.generate(prompts, sampling)] == [r.tokens for r in plain]
        assert made.speculation.accepted > 0.25 * made.speculation.drafted > 0
    assert made.scheduler.preemptions > 0 and made.stats()["prefix_hits"] > 0


def test_the_tree_follows_what_is_right():
    """Of a head that is right at once and one that never is, only the first one's guesses are in the tree."""
    drafter = MedusaHeads(models.build("medusa", heads=2))
    before = [drafter.gain(Rate(), width) for width in range(1, drafter.widest + 1)]
    assert before == sorted(before) and [drafter.size(w) for w in (1, drafter.widest)] == [SIZES[0], SIZES[-1]]

    class Row:
        id = 0

    for _ in range(400):
        drafter._made[0] = 0, [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27]]
        Row.tokens = [7, 1]
        drafter._observe(Row)
    drafter._grow()
    assert drafter._nodes[0] == (0, 2) and drafter.gain(Rate(), 1) > 1.9
    assert drafter.gain(Rate(), drafter.widest) < 2.2
    for node, parent in enumerate(drafter._parents):
        assert parent < node


def test_trees_grow_as_far_as_columns_are_cheap():
    def chosen(seconds_of):
        width = Width(drafter.widest, drafter)
        for columns in (1, *(1 + size for size in SIZES)):
            told(width.add, 1, columns, seconds_of(columns))
        return width.choose([Rate()])

    drafter = MedusaHeads(models.build("medusa", heads=3))
    widths = [chosen(lambda columns, cost=cost: 1 + cost * columns) for cost in (0.0, 0.05, 0.2, 1.0, 10.0)]
    assert widths == sorted(widths, reverse=True) and widths[0] == drafter.widest and widths[-1] == 0
    assert len(set(widths)) > 3


def test_few_heads_and_a_small_vocabulary():
    """Fewer combinations than a tree could hold."""
    for heads, vocab in ((1, 64), (1, 4), (2, 2)):
        model = models.build("medusa", heads=heads, vocab=vocab).eval()
        drafter = MedusaHeads(model)
        sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
        made = engine(model, drafter, drafter.widest)
        assert made.generate([[1, 0]], sampling)[0].tokens == engine(model).generate([[1, 0]], sampling)[0].tokens
        assert drafter.size(drafter.widest) <= sum(min(8, vocab) ** (head + 1) for head in range(heads))


def test_models_without_such_heads_are_refused():
    for make in (MedusaHeads, lambda model: MTPHeads(model, **ROWS)):
        with pytest.raises(ValueError, match="LM"):
            make(models.build("gqa"))
